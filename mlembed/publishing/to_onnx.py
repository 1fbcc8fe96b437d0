"""Convert an exported directory to one ONNX graph, from token ids to the unit vector.

    input_ids, attention_mask: int64 [batch, sequence], padded on the right
    last_hidden_state: fp32 [batch, sequence, D]; sentence_embedding: fp32 [batch, dim]

The graph is the model that transformers reads back, then the pooling, Dense modules and Normalize,
if any, of modules.json. Readers look for these names: optimum, and through it the onnx backend of
sentence-transformers, and transformers.js open onnx/model.onnx and use last_hidden_state, after
which they pool themselves, or sentence_embedding. The graph has no segment ids as input, as a text
has but one segment; readers feed the inputs that a graph names.

A protobuf ends at 2 GiB. Larger weights go to onnx/model.onnx_data, the name that transformers.js
and text-embeddings-inference use.

The int8 graph has the name that transformers.js reads as `q8`.
"""

import importlib
import logging
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ..inference.onnx_encoder import INPUTS, OUTPUTS, open_graph
from ..runtime.files import read_json

FILE, INT8_FILE = "onnx/model.onnx", "onnx/model_quantized.onnx"
OPSET = 18  # The oldest version that torch's exporter writes without a conversion.
MOST_INLINE = 2_000_000_000  # Bytes of weights; a protobuf holds 2^31 with the graph.


def require() -> None:
    """Raise ValueError if a package that writes or reads ONNX is missing."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(
                f"format onnx: expected {name}, which cannot be imported ({error}): "
                "pip install 'mlembed[onnx]'"
            ) from None


class Pipeline(nn.Module):
    """A transformers model, and the modules that modules.json lists after it."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        from transformers import AutoModel

        self.encoder = AutoModel.from_pretrained(
            directory, local_files_only=True, dtype=torch.float32, attn_implementation="eager"
        )
        pooling = read_json(directory / "1_Pooling" / "config.json")
        self.pooling = next(k for k, on in pooling.items() if k.startswith("pooling_mode_") and on)
        modules = read_json(directory / "modules.json")
        self.dense = nn.ModuleList(
            _dense(directory / module["path"])
            for module in modules
            if module["type"].endswith(".Dense")
        )
        self.normalize = any(module["type"].endswith(".Normalize") for module in modules)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return last_hidden_state [B, S, D] and sentence_embedding [B, dim]."""
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        hidden = output.last_hidden_state
        if self.pooling == "pooling_mode_cls_token":
            pooled = hidden[:, 0]
        elif self.pooling == "pooling_mode_mean_tokens":
            mask = attention_mask[..., None].to(hidden.dtype)
            pooled = (hidden * mask).sum(1) / mask.sum(1)
        else:
            rows = torch.arange(hidden.shape[0], device=hidden.device)
            pooled = hidden[rows, attention_mask.sum(1) - 1]
        for layer in self.dense:
            pooled = layer(pooled)
        return hidden, F.normalize(pooled, dim=-1) if self.normalize else pooled


def _dense(directory: Path) -> nn.Module:
    """Return a Dense module of sentence-transformers: its layer, and its tanh if it has one."""
    weights = load_file(directory / "model.safetensors")
    weight, bias = weights["linear.weight"], weights.get("linear.bias")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    activation = read_json(directory / "config.json")["activation_function"].rpartition(".")[2]
    return nn.Sequential(layer, nn.Tanh()) if activation == "Tanh" else layer


def write(directory: Path, most_inline: int = MOST_INLINE) -> Path:
    """Add onnx/model.onnx to an exported directory; return its path. The caller compares vectors.

    Args:
        most_inline: bytes of weights that still go into the graph's own file.

    Raises:
        ValueError: onnx, onnxscript or onnxruntime is not installed.
    """
    require()
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    pipeline = Pipeline(directory).eval().requires_grad_(False)
    # Batch and length are neither 1 nor equal, and one row is padded, so that the exporter takes no
    # size for a constant. The padding token is the true one, as XLM-R counts positions by it.
    pad = pipeline.encoder.config.pad_token_id or 0
    length = min(7, pipeline.encoder.config.max_position_embeddings - pad - 1)
    mask = torch.ones(3, length, dtype=torch.int64)
    mask[0, length // 2 :] = 0
    ids = torch.where(mask > 0, pad + 1, pad)
    axes = {0: "batch", 1: "sequence"}
    # Torch's exporter warns of packages that no model here uses.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                pipeline,
                (ids, mask),
                dynamo=True,
                opset_version=OPSET,
                input_names=INPUTS,
                output_names=OUTPUTS,
                dynamic_shapes=(axes, axes),
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert program is not None
    # The metadata has stack traces with paths of this machine.
    ClearMetadataAndDocStringPass()(program.model)
    path = directory / FILE
    path.parent.mkdir()
    size = sum(w.numel() * w.element_size() for w in pipeline.parameters())
    data = f"{path.name}_data" if size > most_inline else None
    onnx_ir.save(program.model, path, external_data=data)
    return path


def quantise(directory: Path) -> None:
    """Add onnx/model_quantized.onnx to a directory that has onnx/model.onnx.

    Weights of products and the vocabulary become integers with a scale for each column, 7 bits of
    8, as sums of wider ones overflow on CPUs without VNNI. Activations are quantised when the graph
    runs, with one scale for a batch, so a text's vector depends a little on its batch. Modules that
    follow the pooling stay in fp32.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source = directory / FILE
    nodes = onnx.load(source, load_external_data=False).graph.node
    # The quantiser recommends a pre-processing, which the exporter has done.
    logging.disable(logging.WARNING)
    try:
        quantize_dynamic(
            source,
            directory / INT8_FILE,
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            # Dense modules are Gemm nodes, since their input has no axis of tokens.
            nodes_to_quantize=[n.name for n in nodes if n.op_type in ("MatMul", "Gather")],
            use_external_data_format=source.with_name(f"{source.name}_data").exists(),
        )
    finally:
        logging.disable(logging.NOTSET)


def read(directory: Path, tokens: dict[str, np.ndarray], file: str = FILE) -> np.ndarray:
    """Return onnxruntime's sentence_embedding, fp32 [2, N, dim]: of all texts as one padded batch,
    and of each text alone, without padding.

    Args:
        tokens: input_ids and attention_mask, int64 [N, S].
        file: the graph.
    """
    session = open_graph(directory / file)
    (together,) = session.run(OUTPUTS[1:], {name: tokens[name] for name in INPUTS})
    alone = []
    for ids, mask in zip(*(tokens[name] for name in INPUTS), strict=True):
        text = {"input_ids": ids[None, mask > 0], "attention_mask": mask[None, mask > 0]}
        alone.append(session.run(OUTPUTS[1:], text)[0])
    return np.stack([together, np.concatenate(alone)])
