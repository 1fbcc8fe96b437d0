"""Headless Chromium over DevTools' pipe: opens one page and records its events."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATH = next(filter(None, map(shutil.which, NAMES)), None)

# DevTools' pipe is file descriptors 3 and 4 of the browser; here each may have the other number.
HAND_OVER = """
import fcntl, os, sys
high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
os.dup2(high[0], 3), os.dup2(high[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """A file in the browser. `seen`: all events, from which `requests` and `complaints` select."""

    def __init__(self, path, profile):
        to_it, mine = os.pipe()
        self.reader, from_it = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        flags += ["--disable-dev-shm-usage", "--remote-debugging-pipe"]
        hand_over = [sys.executable, "-c", HAND_OVER, str(to_it), str(from_it)]
        self.process = subprocess.Popen(
            [*hand_over, PATH, *flags, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_it, from_it),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": str(profile)},
        )
        os.close(to_it), os.close(from_it)
        self.writer, self.buffer, self.count, self.session = mine, b"", 0, None
        self.seen = []
        (target,) = (t for t in self.ask("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, *error):
        os.close(self.writer)
        self.process.terminate()
        self.process.wait(20)
        os.close(self.reader)

    def _message(self):
        while b"\0" not in self.buffer:
            assert select.select([self.reader], [], [], 60)[0], "no message for a minute"
            more = os.read(self.reader, 1 << 20)
            assert more, "Chromium ended"
            self.buffer += more
        line, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(line)

    def ask(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self.count:
            self.seen.append(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def open(self, width, scheme="light", media="screen", height=800):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", media=media, features=features)
        first = len(self.seen)
        self.ask("Page.navigate", url=self.path.resolve().as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.seen[first:]):
            self.seen.append(self._message())

    def value(self, expression):
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def pdf(self):
        return base64.b64decode(self.ask("Page.printToPDF", preferCSSPageSize=True)["data"])

    def events(self, method):
        return [e["params"] for e in self.seen if e.get("method") == method]

    @property
    def requests(self):
        """Requested addresses, without those that hold their own data."""
        urls = [e["request"]["url"] for e in self.events("Network.requestWillBeSent")]
        return [url for url in urls if not url.startswith("data:")]

    @property
    def complaints(self):
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event for kind in kinds for event in self.events(kind)]
