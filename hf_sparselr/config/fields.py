"""Every field of the config, declared once: name, type, default, kind and help.

`SparseLRConfig`, the options of `hf-sparselr compress` and the reference page in this room's README are made from it.
"""

import dataclasses
import inspect
import textwrap
from dataclasses import dataclass, field
from typing import Any

from ..data.sources import C4
from ..solvers.registry import METHODS, PRECOMPUTED
from .kinds import (
    Calibration,
    Choice,
    Integer,
    Kernel,
    Kind,
    Numbers,
    Options,
    Overrides,
    Reader,
    Regexes,
    Share,
    Sparsity,
)
from .presets import PRESETS

LOW_RANKS = ("flat", "hss", None)
ALLOCATIONS = ("uniform", "owl", "global")
REFINEMENTS = ("tm", "distill", "tm+distill", None)
MAX_SEED = 2**32 - 1  # what NumPy takes; torch takes more
MAX_RANK = 2**20
MAX_TOKENS = 2**31 - 1


def about(kind: Kind, help: str, *, stored: bool = True, on_command_line: bool = True) -> dict[str, Any]:
    """The metadata of a declared field; the arguments are attributes of `Field`."""
    return {"kind": kind, "help": help, "stored": stored, "on_command_line": on_command_line}


@dataclass(eq=False, repr=False)
class Fields:
    """The fields in the order of the arguments."""

    method: str = field(
        default="3basil",
        metadata=about(
            Choice(tuple(METHODS), hidden=(PRECOMPUTED,)),
            'layer solver: "3basil" (arXiv 2603.01376), "oats", "hassle-free-alps", "hassle-free-sparsegpt", "eora", '
            '"sslc", "shss" (arXiv 2601.07839); pruning alone, with rank=0: "alps", "sparsegpt", "wanda", "magnitude"; '
            'low rank alone, with sparsity=None: "svd"',
        ),
    )
    sparsity: str | float | None = field(
        default="2:4",
        metadata=about(
            Sparsity(),
            '"n:m" keeps n of every m consecutive inputs; a fraction in [0, 1) sets exactly floor(fraction * out * in) '
            "entries of every layer to zero",
        ),
    )
    rank: int | None = field(
        default=64, metadata=about(Integer(0, MAX_RANK, optional=True), "rank of B A; 0 is sparsity alone")
    )
    low_rank: str | None = field(
        default=None,
        metadata=about(
            Choice(LOW_RANKS),
            'form of the low-rank part: "flat" (B A) or "hss" (arXiv 2601.07839), a hierarchy of low-rank blocks '
            'beside the diagonal, where rank is that of the outermost, and dense blocks on it; None is "hss" with '
            'method="shss", else "flat". At equal bytes "flat" is at least as good with all layers compressed; in Q, K '
            "and V alone a calibrated hierarchy was slightly ahead at 50%",
        ),
    )
    hierarchy: Any = field(
        default=None,
        metadata=about(
            Options(),
            'with low_rank="hss": a dict, or HierarchyOptions of hf_sparselr.config.hierarchy',
        ),
    )
    compression: float | None = field(
        default=None,
        metadata=about(
            Share(exclusive=True),
            "share c of each layer's parameters to remove, in (0, 1), in the place of sparsity and rank: S gets the "
            "sparsity c + k - c k, and B A the rank floor(k (1 - c) out in / (out + in)), with k = rank_ratio",
        ),
    )
    rank_ratio: float | None = field(
        default=None,
        metadata=about(
            Share(),
            "with compression: share k in [0, 1) of the kept parameters that B and A get; None is 0.25",
        ),
    )
    refine: str | None = field(
        default="tm",
        metadata=about(
            Choice(REFINEMENTS),
            'training after the layer solves: "tm" (transformer matching, block by block), "distill" (the whole model '
            'against the logits of the dense one), "tm+distill" (both in turn) or None',
        ),
    )
    effort: str = field(
        default="default",
        metadata=about(
            Choice(tuple(PRESETS)),
            '"fast", "default", "high", or "published" (the schedule and precision of the paper); sets every option '
            "that method_options, tm and distill leave open",
        ),
    )
    calibration: Any = field(
        default=C4,
        metadata=about(
            Calibration(),
            '"self" (text sampled from the model itself), "file:GLOB", a Hub data set ("id" or "id:config"), a list of '
            "texts, chats (lists of message dicts), a datasets.Dataset, token ids (a 2-D integer tensor, or an "
            "iterable of integer tensors), dicts of model inputs as a processor returns them, or a list of images or "
            "audio arrays",
        ),
    )
    num_samples: int = field(default=128, metadata=about(Integer(1), "calibration windows or other samples"))
    seq_len: int = field(
        default=2048,
        metadata=about(Integer(2, MAX_TOKENS), "tokens in a window, bounded by the model's context"),
    )
    noisy_windows: float | None = field(
        default=None,
        metadata=about(
            Share(),
            "for each calibration window of tokens, so many more (0 to 1) in which 30% of the tokens are replaced by "
            "random ones: with them the layer solves, matching and distillation (of the model's own text, too) do "
            'better on text unlike the calibration text; None is 0 with effort="published", else 0.5',
        ),
    )
    batch_size: int = field(
        default=8,
        metadata=about(
            Integer(1),
            "windows at a time on the device, at most: models with large layers take fewer long ones; bounds memory "
            "and changes results by rounding alone",
        ),
    )
    seed: int = field(
        default=0,
        metadata=about(
            Integer(0, MAX_SEED), "seed of calibration windows, low-rank start and order of training batches"
        ),
    )
    targets: list[str] | None = field(
        default=None,
        metadata=about(
            Regexes(),
            "regular expressions of layers to compress; one that matches the end of a module's dotted name covers the "
            "layers below it. None: all linear layers of the transformer blocks",
        ),
    )
    ignore: list[str] | None = field(
        default=None,
        metadata=about(Regexes(), "regular expressions, as in targets, of layers to leave dense; beats targets"),
    )
    overrides: dict[str, dict] | None = field(
        default=None,
        metadata=about(
            Overrides(),
            '{regex: {"sparsity": ..., "rank": ..., "skip": bool}}: settings of some layers, with regular expressions '
            "as in targets; the first that covers a layer wins, and beats budget and allocation",
        ),
    )
    on_incompatible: str = field(
        default="error",
        metadata=about(
            Choice(("error", "skip")),
            '"error" or "skip" (leave dense) for layers whose shape does not fit the pattern or the rank',
        ),
    )
    allocation: str = field(
        default="uniform",
        metadata=about(
            Choice(ALLOCATIONS),
            '"uniform"; "owl" (arXiv 2310.05175): blocks whose Wanda scores have more outliers stay denser; "global": '
            "each layer's sparsity and rank by its measured errors, at no more parameters than uniform settings keep, "
            "for the price of a longer run; often the largest gain at equal bytes (compression/README.md). "
            'An "n:m" pattern stays as it is: "global" then moves ranks alone, and "owl" is an error',
        ),
    )
    allocation_options: Any = field(
        default=None,
        metadata=about(
            Options(),
            "options of the allocation: a dict, or OwlOptions or GlobalOptions of hf_sparselr.config.options",
        ),
    )
    method_options: Any = field(
        default=None,
        metadata=about(Options(), "options of the method: a dict, or the Options dataclass of its module"),
    )
    tm: Any = field(
        default=None,
        metadata=about(
            Options(),
            "options of transformer matching: a dict, or TMOptions of hf_sparselr.config.options",
        ),
    )
    distill: Any = field(
        default=None,
        metadata=about(Options(), "options of distillation: a dict, or DistillOptions of hf_sparselr.config.options"),
    )
    damping: tuple[float, float] = field(
        default=(0.005, 0.005),
        metadata=about(
            Numbers(2),
            "added to the diagonal of the Gram matrix: relative to each entry, and relative to their mean",
        ),
    )
    tokenizer: Any = field(
        default=None,
        metadata=about(
            Reader(),
            "tokenizer or processor, for text, chats, images and audio; None loads it from where the model comes from",
            stored=False,
            on_command_line=False,
        ),
    )
    device: Any = field(
        default=None,
        metadata=about(
            Kind(),
            "where blocks are worked on; None: the model's accelerator, else CUDA, else the CPU",
            stored=False,
        ),
    )
    activations: str = field(
        default="device",
        metadata=about(
            Choice(("device", "host", "disk")),
            '"device" keeps the hidden states of all windows beside the block at work; "host" keeps them in main '
            'memory and moves one batch at a time; "disk" keeps them in files of the temporary folder (TMPDIR)',
            stored=False,
        ),
    )
    kernel: str = field(
        default="auto",
        metadata=about(
            Kernel(),
            'how packed layers compute: "auto" (the fastest, measured once a device), "packed" (S is never unpacked '
            'for up to 16 rows of input) or "dense" (S + B A stays in memory too); in a config given with a packed '
            "checkpoint, the only field that counts",
            stored=False,
            on_command_line=False,
        ),
    )


@dataclass(frozen=True)
class Field:
    """One declared field.

    Attributes:
        type: the annotation, as text.
        kind: checks values and reads them from the command line.
        help: one sentence without a full stop.
        stored: whether config.json holds it; otherwise it belongs to one run.
        on_command_line: whether `hf-sparselr compress` has an option for it.
    """

    name: str
    type: str
    default: Any
    kind: Kind
    help: str
    stored: bool
    on_command_line: bool


FIELDS = {
    item.name: Field(item.name, inspect.formatannotation(item.type), item.default, **item.metadata)
    for item in dataclasses.fields(Fields)
}


def documented(text: str) -> str:
    """A docstring with the declared fields in the place of the line "{arguments}"."""
    entries = []
    for item in FIELDS.values():
        end = "." if item.stored else ". Never stored."
        entry = f"{item.name}: {item.help}{end}"
        indent = " " * 8
        entries.append(
            textwrap.fill(
                entry,
                110,
                initial_indent=indent,
                subsequent_indent=indent + " " * 4,
                break_on_hyphens=False,
            )
        )
    return text.replace("        {arguments}", "\n".join(entries))
