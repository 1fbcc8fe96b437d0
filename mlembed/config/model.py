"""Shape and nesting of the encoder."""

from dataclasses import dataclass
from typing import Literal

from .choices import Pooling
from .strict import check_numbers, check_rising, machine, number

# Exits of ML-Embed's released code; the last layer is added.
ML_EMBED_EXITS = (1, 2, 4, 8, 16, 24, 32, 40, 48)
# Bounds of widths and depths.
WIDEST, DEEPEST = 2**16, 1000


@dataclass(frozen=True)
class Model:
    """Shape and nesting of the encoder (names as in Hugging Face configurations)."""

    style: Literal["qwen3", "bert", "transformers"] = "qwen3"
    """qwen3: RMSNorm before each sublayer, rotary positions, SwiGLU, no biases. bert: LayerNorm
    after each sublayer, learned positions, GELU, biases. transformers: the layers of `init`, by
    transformers."""
    architecture: str = ""
    """config.json of transformers, as text, with style transformers; read from `init`."""
    vocab_size: int = number(8192, above=0, most=2**24)
    """Number of tokens; the most that a tokenizer trained here may learn."""
    hidden_size: int = number(256, above=0, most=WIDEST)
    num_hidden_layers: int = number(4, above=0, most=DEEPEST)
    num_attention_heads: int = number(4, above=0, most=2**12)
    num_key_value_heads: int = number(2, above=0, most=2**12)
    head_dim: int = number(64, above=0, most=2**12)
    intermediate_size: int = number(768, above=0, most=2**20)
    rope_theta: float = number(10_000.0, least=1, most=1e12)
    rms_norm_eps: float = number(1e-6, least=1e-30, most=1)
    layer_norm_eps: float = number(1e-12, least=1e-30, most=1)
    max_position_embeddings: int = number(512, above=0, most=2**24)
    """Length of the longest text, in tokens."""
    position_offset: int = number(0, least=0, most=2**24)
    """Rows of a position table before position 0: 0, or 2 for RoBERTa and XLM-R."""
    type_vocab_size: int = number(2, above=0, most=2**16)
    """Rows of a BERT's segment table, whose first row is added to every token."""
    causal: bool = True
    """Each token attends only to earlier tokens (like Qwen3), otherwise to the whole text."""
    pooling: Pooling = "last"
    """Embedding of a text: its last token (EOS), the mean of all tokens, the first token ([CLS]),
    or BERT's pooler, tanh of a dense layer over the first token."""
    dense: tuple[int, ...] = number((), above=0, most=WIDEST)
    """Output widths of linear layers after the pooling, the last = hidden_size, with style
    transformers; read from `init`."""
    exits: tuple[int, ...] = number((), above=0, most=DEEPEST)
    """Depths at which texts are pooled, the last = all layers. Empty: 1, 2, 4, 8, 16, .. all."""
    last_layers: int = number(0, least=0, most=DEEPEST)
    """Number of last layers that every exit ends with, H: exit l runs layers 1..l - H, then the
    last H. 0: exit l runs layers 1..l."""
    matryoshka_dims: tuple[int, ...] = number((), above=0, most=WIDEST)
    """Nested widths, the last = hidden_size. Empty: powers of two from 8, and hidden_size."""
    ranks: tuple[int, ...] = number((), above=0, most=WIDEST)
    """Nested ranks of the vocabulary U[:, :r] W[:r]; the last is stored. Empty: a plain table."""
    dropout: float = number(0.0, least=0, below=1)
    """Dropout of the outputs of attention and of the MLP, in training."""
    attention: Literal["auto", "triton", "sdpa", "varlen", "flash_attn", "xformers"] = machine(
        "auto"
    )
    """Backend of attention. auto: our Triton kernel on CUDA, torch elsewhere."""

    def __post_init__(self) -> None:
        check_numbers(self, "model.")
        L, D, H = self.num_hidden_layers, self.hidden_size, self.last_layers
        if not self.exits:
            exits = tuple(x for x in ML_EMBED_EXITS if H < x < L) + (L,)
            object.__setattr__(self, "exits", exits)
        if not self.matryoshka_dims:
            powers = tuple(2**i for i in range(3, 15) if 2**i < D)
            object.__setattr__(self, "matryoshka_dims", (*powers, D))
        check_rising("model.exits", self.exits, L, "depth num_hidden_layers")
        check_rising("model.matryoshka_dims", self.matryoshka_dims, D, "width hidden_size")
        if self.ranks:
            check_rising("model.ranks", self.ranks, min(D, self.vocab_size), "width hidden_size")
        if self.exits[-1] != L:
            raise ValueError(
                f"model.exits: expected to end at the last layer {L}, got {self.exits}"
            )
        if self.exits[0] <= H:
            raise ValueError(f"model.exits: expected more than last_layers {H}, got {self.exits}")
        if self.matryoshka_dims[-1] != D:
            raise ValueError(
                f"model.matryoshka_dims: expected to end at hidden_size {D}, "
                f"got {self.matryoshka_dims}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "model.num_key_value_heads: expected a divisor of num_attention_heads "
                f"{self.num_attention_heads}, got {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim: expected an even number, got {self.head_dim}")
        if (self.style == "transformers") != bool(self.architecture):
            want = "that of init with style transformers" if not self.architecture else "none"
            got = "another value" if self.architecture else "none"
            raise ValueError(
                f"model.architecture: expected {want}, got {got} with style {self.style}"
            )
        if self.dense and (self.style != "transformers" or self.dense[-1] != D):
            raise ValueError(
                f"model.dense: expected layers with style transformers that end at hidden_size "
                f"{D}, got {self.dense} with style {self.style}"
            )
        if self.style == "bert":
            self._check_bert()
        elif self.pooling == "pooler":
            raise ValueError("model.pooling: expected last, mean or cls without style bert")

    def _check_bert(self) -> None:
        heads = self.num_attention_heads
        if self.causal:
            raise ValueError("model.causal: expected False with style bert, got True")
        if self.num_key_value_heads != heads or heads * self.head_dim != self.hidden_size:
            raise ValueError(
                "model: expected as many key-value heads as heads, together hidden_size "
                f"{self.hidden_size} wide, with style bert, got {self.num_key_value_heads} and "
                f"{heads} heads of {self.head_dim}"
            )

    def check(
        self, dim: int | None = None, exit: int | None = None, rank: int | None = None
    ) -> None:
        """Raise ValueError for a width, depth or vocabulary rank outside of this shape."""
        if dim is not None and not 1 <= dim <= self.hidden_size:
            raise ValueError(f"dim: expected 1..{self.hidden_size} (the width), got {dim}")
        if exit is not None and not self.last_layers < exit <= self.num_hidden_layers:
            depths = f"{self.last_layers + 1}..{self.num_hidden_layers}"
            raise ValueError(f"exit: expected {depths} (the depth), got {exit}")
        if rank is not None and not self.ranks:
            raise ValueError(f"rank: expected none for a plain vocabulary table, got {rank}")
        if rank is not None and not 1 <= rank <= self.ranks[-1]:
            raise ValueError(f"rank: expected 1..{self.ranks[-1]} (the stored rank), got {rank}")

    def layers_of(self, exit: int) -> tuple[int, ...]:
        """Return the layers that an exit runs, in their order, from 1 on."""
        L, H = self.num_hidden_layers, self.last_layers
        return (*range(1, exit - H + 1), *range(L - H + 1, L + 1))

    def depths_of(self, layer: int) -> tuple[int, ...]:
        """Return the depth that a text needs for each run of a layer, from 1 on, in a forward.

        The last layers run once for every exit.
        """
        shared = layer > self.num_hidden_layers - self.last_layers
        return self.exits if shared else (layer + self.last_layers,)
