"""Named choices that a command and the library behind it share. Imports no torch."""

from typing import Literal

BadRows = Literal["error", "skip"]
CacheKind = Literal["factors", "text", "tokens"]
Dtype = Literal["float32", "bfloat16", "float16"]
Invalid = Literal["error", "replace"]
Method = Literal["soup", "slerp"]
Pooling = Literal["last", "mean", "cls", "pooler"]
Precision = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]
PruneBy = Literal["first", "activation"]
Stored = Literal["int8", "binary"]
