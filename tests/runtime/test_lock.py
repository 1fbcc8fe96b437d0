"""One owner of a directory: kernels' locks, heartbeats, and what a dead owner leaves."""
