"""Fine-tune a compressed model from its own factors, and from other starts of the same rank, through Trainer.

    python examples/finetune_lora.py                                              # the embedded model
    python examples/finetune_lora.py --model DIR --train file:valid.txt --test file:test.txt --steps 300
    python examples/finetune_lora.py --model NAME --chat                          # on examples/chat.jsonl

MODEL is dense, and compressed first, or was compressed before. Texts are "file:GLOB", a Hub data set ("id" or
"id:config") or "FILE.safetensors:NAME", token ids (windows, length). The starts:

    own factors        S + B A as compressed; B and A train
    zero, beside them  S + B A + B' A': ordinary LoRA, B' = 0, beside B and A, which stay
    zero, in place     S + B' A' with B' = 0: what the factors' values are worth
    random, in place   S + B' A', as large as B A but random: like PiSSA's, no factor starts at zero

With --recovery no adapter is added; S + B A itself trains (hf_sparselr.train_mode), at 70% zeros by default.
"""

import argparse
import copy
import itertools
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import quickstart
import torch
import transformers
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hf_sparselr

CHATS = Path(__file__).with_name("chat.jsonl")
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"  # for tokenizers without one


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(quickstart.MODEL))
    add("--train", help="default: the standard library's source")
    add("--test", help="default: modules of it that the embedded model never saw")
    add("--test-windows", type=int, default=48, help="how many of the test text, spread evenly; 0: all")
    add("--calibration", default="allenai/c4", help="for a dense --model, as SparseLRConfig's")
    add("--calibration-tokens", help="FILE.safetensors with `calibration`: token ids (windows, length)")
    add("--sparsity", help="default: 2:4, or 0.7 with --recovery")
    add("--rank", type=int, default=16)
    add("--refine", choices=["tm", "none"], default="tm")
    add("--steps", type=int, default=24)
    add("--lr", type=float, nargs="+", default=[3e-4], help="several: every run at each of them")
    add("--batch-size", type=int, default=8)
    add("--length", type=int, default=256, help="tokens a window")
    add("--evaluations", type=int, default=4, help="points of a learning curve")
    add("--seed", type=int, default=0)
    add("--chat", action="store_true", help="train and test on examples/chat.jsonl")
    add("--recovery", action="store_true", help="factors, factors+norms and full training")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", help="write everything that was measured to this file")
    add("--png", default="finetune_lora.png", help="where to draw the learning curves")
    return parser.parse_args()


def windows(source: str | None, split: str, tokenizer, length: int, most: int | None) -> list[torch.Tensor]:
    """A text cut into windows of `length` tokens, no more than `most`."""
    if source is None:
        texts = quickstart.read(held_out=split == "test")
    elif ".safetensors:" in source:
        file, _, name = source.rpartition(":")
        return list(load_file(file)[name].long())
    else:
        texts = hf_sparselr.load_texts(source, split)
    ids: list[int] = []
    for text in texts:
        if most is None or len(ids) < most * length:
            ids += tokenizer(text + "\n\n", verbose=False)["input_ids"]
    count = min(len(ids) // length, most or len(ids))
    return list(torch.tensor(ids[: count * length]).view(count, length))


def chats(split: str, tokenizer) -> list[torch.Tensor]:
    """Conversations under the tokenizer's chat template; every fifth one is for the test."""
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    lines = [json.loads(line)["messages"] for line in CHATS.read_text(encoding="utf-8").splitlines()]
    kept = [messages for i, messages in enumerate(lines) if (i % 5 == 4) == (split == "test")]
    options = {"return_tensors": "pt", "return_dict": True}
    return [tokenizer.apply_chat_template(messages, **options)["input_ids"][0] for messages in kept]


def compress(args: argparse.Namespace, tokenizer, folder: Path, score: Callable) -> dict[str, float]:
    """Writes the packed model to `folder`; returns the perplexity of the dense one, where that is given."""
    if hasattr(AutoConfig.from_pretrained(args.model), "quantization_config"):
        AutoModelForCausalLM.from_pretrained(args.model).save_pretrained(folder)
        return {}
    sparsity = args.sparsity or ("0.7" if args.recovery else "2:4")
    if args.calibration_tokens:
        tokens = load_file(args.calibration_tokens)["calibration"].long()
        data = {"calibration": tokens, "num_samples": tokens.shape[0], "seq_len": tokens.shape[1]}
    elif args.model == str(quickstart.MODEL):  # less than the defaults, to be quick
        data = {"calibration": quickstart.read(held_out=False), "num_samples": 16, "seq_len": 512}
        data["tm"] = {"passes": 5}
    else:
        data = {"calibration": args.calibration}
    config = hf_sparselr.SparseLRConfig(
        sparsity=sparsity if ":" in sparsity else float(sparsity),
        rank=args.rank,
        refine=None if args.refine == "none" else args.refine,
        tokenizer=tokenizer,
        device=args.device,
        seed=args.seed,
        **data,
    )
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    scores = {"dense": score(model.to(args.device))}
    hf_sparselr.compress(model, config).save_pretrained(folder)
    return scores


def beside(model: transformers.PreTrainedModel):
    """Ordinary LoRA on the same layers, with the ranks of their factors."""
    config = copy.copy(hf_sparselr.lora_config(model))
    config.init_lora_weights = True
    return get_peft_model(model, config)


@torch.no_grad()
def in_place(model: transformers.PreTrainedModel, start: str):
    """The factors' adapter, with other values in it."""
    model = hf_sparselr.as_peft_model(model)
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and start == "zero":
            layer.reset_lora_parameters("default", True)
        elif isinstance(layer, LoraLayer):
            for factor in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                factor.normal_(std=factor.std().item())
    return model


STARTS = {
    "own factors": hf_sparselr.as_peft_model,
    "zero, beside them": beside,
    "zero, in place": partial(in_place, start="zero"),
    "random, in place": partial(in_place, start="random"),
}
MODES = {mode: partial(hf_sparselr.train_mode, mode=mode) for mode in ("factors", "factors+norms", "full")}


class Curve(transformers.TrainerCallback):
    """Perplexity on the test text before, during and after training: [(step, value), ...]."""

    def __init__(self, score: Callable, every: int) -> None:
        self.score, self.every, self.points = score, every, []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.points.append((0, self.score(model)))

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.points.append((state.global_step, self.score(model)))


def train(model, data: list[torch.Tensor], tokenizer, args, lr: float, score: Callable) -> list[tuple]:
    options = transformers.TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is saved
        per_device_train_batch_size=args.batch_size,
        max_steps=args.steps,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, args.steps // 20),
        seed=args.seed,
        save_strategy="no",
        report_to=[],
        use_cpu=args.device == "cpu",
    )
    samples = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in data]
    collator = transformers.DataCollatorForSeq2Seq(tokenizer)  # pads labels with what the loss leaves out
    curve = Curve(score, max(1, args.steps // args.evaluations))
    transformers.Trainer(model, options, collator, samples, callbacks=[curve]).train()
    return curve.points


def draw(curves: dict[str, list], references: dict[str, float], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = panels = figure.subplots(1, 2)  # everything, and where the runs end
    for axes in panels:
        for label, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        for label, value in references.items():
            axes.axhline(value, color="grey", linestyle=":" if label == "dense" else "--", label=label)
        axes.set(xlabel="step", ylabel="perplexity on the test text", yscale="log")
    lowest = min(value for points in curves.values() for _, value in points)
    ends = max(points[-1][1] for points in curves.values())
    right.set(ylim=(lowest * 0.99, min(references["compressed"] * 1.02, 2 * ends)), yscale="linear")
    left.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    args = parse()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if args.chat:
        data, test = chats("train", tokenizer), chats("test", tokenizer)
    else:
        data = windows(args.train, "train", tokenizer, args.length, args.steps * args.batch_size)
        test = windows(args.test, "test", tokenizer, args.length, None)
        count = args.test_windows or len(test)
        test = test[:: max(1, len(test) // count)][:count]
    score = partial(hf_sparselr.perplexity, data=test)
    curves, rows = {}, [("run", "trained parameters", "start", "final", "of the gap to dense")]
    runs = itertools.product(args.lr, (MODES if args.recovery else STARTS).items())
    with tempfile.TemporaryDirectory() as folder:
        references = compress(args, tokenizer, Path(folder), score)
        for lr, (label, prepare) in runs:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(args.device)
            before = references.setdefault("compressed", score(model))
            torch.manual_seed(args.seed)
            model = prepare(model)
            label = label if len(args.lr) == 1 else f"{label}, lr {lr:g}"
            curve = curves[label] = train(model, data, tokenizer, args, lr, score)
            count = sum(p.numel() for p in model.parameters() if p.requires_grad)
            back = (before - curve[-1][1]) / (before - references.get("dense", float("nan")))
            share = f"{back:.0%}" if 0 < back <= 1 else ">100%" if back > 1 else "-"  # or dense is not known
            rows.append((label, f"{count:,}", f"{curve[0][1]:.3f}", f"{curve[-1][1]:.3f}", share))
            print("  ".join(rows[-1]), flush=True)
    print("\n" + ", ".join(f"{label}: {value:.3f}" for label, value in references.items()) + "\n")
    for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]):
        print(f"| {' | '.join(row)} |")
    draw(curves, references, args.png)
    if args.json:
        record = {"arguments": vars(args), "references": references, "curves": curves}
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
