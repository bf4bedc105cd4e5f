"""Converts a GGUF file to an ordinary Hugging Face folder, once per user, which is loaded like any other model
afterwards.

This module defines the target that a file stands for. `transformers` dequantises the weights in float32, one after the
other, and they are rounded once to bfloat16, so that the bfloat16 and the float32 target have the same weights; the
blocks are kept beside them (`gguf_blocks.py`). Tokenizer, chat template, first and last tokens are the file's. In the
tokenizer that `transformers` builds two things are mended: how text is split before merging (kinds that it does not
know it splits as GPT-2 does), and whether a first or last token is added to plain text.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from outdraft.errors import UserError, first_line
from outdraft.output import cache_folder, made_once
from outdraft.target.backends import unloaded, why_not_native_model
from outdraft.target.gguf_blocks import told, write_blocks

SUFFIX = ".gguf"
RECORD = "outdraft_gguf.json"
"""Name of the record in the folder of the file that it was made from."""
LAYOUT = "3"
"""Part of the folders' names; increase it when the same file becomes another folder."""
PACKAGES = ("gguf", "accelerate")
"""Packages with which `transformers` reads GGUF files."""
ENDS_OF_TURN = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
"""Fields of tokens that end an answer beside the end-of-sequence token."""


def gguf_in(source: str | Path) -> Path | None:
    """Return the GGUF file that a path names, or the only one in a folder without a config; None for anything else.

    Raises:
        UserError: no such file, or a folder of several.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() == SUFFIX and not path.is_dir():
        if not path.is_file():
            raise UserError(f"there is no file '{path}'; check the path of the GGUF file")
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == SUFFIX and file.is_file())
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:3]) + (", ..." if len(files) > 3 else "")
        raise UserError(f"'{path}' holds {len(files)} GGUF files ({names}); give the path of one of them")
    return files[0] if files else None


def unpacked(file: Path) -> Path:
    """Return the ordinary folder of a GGUF file: the first call writes it, later calls find it by the file's contents.

    Raises:
        UserError: the file is damaged or of a kind that `transformers` does not read, or a package is missing.
    """
    name = f"gguf-{file.stem}-{_digest(file)}"
    return made_once(name, lambda folder: _unpack(file, folder))


def record_in(folder: str | Path) -> dict[str, Any] | None:
    """Return the record of a folder made from a GGUF file: its `file` name and the kinds of its `weights`."""
    try:
        record: dict[str, Any] = json.loads((Path(folder) / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record


def _digest(file: Path) -> str:
    digest = hashlib.sha256(LAYOUT.encode())
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def _unpack(file: Path, folder: Path) -> None:
    metadata, kinds = _read(file)
    config = _reading(file, lambda: AutoConfig.from_pretrained(file.parent, gguf_file=file.name))
    alone = _reading(file, lambda: unloaded(config, torch.bfloat16))
    own = "" if torch.cuda.is_available() else blocks_serve(alone, kinds)
    hint = f"; --quantize gguf decodes with {own}" if own else ""
    where = str(cache_folder()).replace(str(Path.home()), "~", 1)
    print(
        f"{file.name}: {kinds} weights are dequantised to bfloat16, once (seconds to minutes; kept in {where}){hint}",
        file=sys.stderr,
        flush=True,
    )
    model = _dequantised(file, config, metadata)
    tokenizer, notes = _reading(file, lambda: tokenizer_of(file, metadata))
    for note in notes:
        print(f"{file.name}: {note}", file=sys.stderr, flush=True)
    ends = dict.fromkeys(metadata[key] for key in ("tokenizer.ggml.eos_token_id", *ENDS_OF_TURN) if key in metadata)
    if ends:
        model.generation_config.eos_token_id = list(ends) if len(ends) > 1 else next(iter(ends))
    try:
        with _quiet():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        write_blocks(file, model, folder)
        record = {"file": file.name, "weights": kinds, "name": metadata.get("general.name")}
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except Exception as error:  # safetensors has exceptions of its own for a full disk
        raise UserError(
            f"the dequantised weights of '{file.name}' cannot be written to '{cache_folder()}' ({first_line(error)}); "
            "set OUTDRAFT_CACHE to a folder with room"
        ) from error


def _read(file: Path) -> tuple[Metadata, str]:
    """Return the file's metadata, and the kinds of its weights, the commonest first."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"GGUF files are read with the package {' and '.join(missing)}, which is missing; pip install "
            "'outdraft[gguf]'"
        )
    import gguf

    reader = _reading(file, lambda: gguf.GGUFReader(file))
    metadata = _reading(file, lambda: {key: field.contents() for key, field in reader.fields.items()})
    for tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.values():  # one of each kind
        _reading(file, partial(gguf.dequantize, tensor.data[:1], tensor.tensor_type))
    matrices = Counter(tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1)
    if not matrices or "general.architecture" not in metadata:
        raise UserError(f"'{file}' holds no language model; choose a GGUF file of one, or download it again")
    return metadata, " and ".join(kind for kind, _ in matrices.most_common())


def blocks_serve(model: Any, kinds: str) -> str:
    """Return what backend `native-gguf` makes of weights of these kinds; empty if it is not for this model here.

    Args:
        model: as of `unloaded`.
        kinds: joined by " and ".
    """
    made = told(kinds)
    return made if made and why_not_native_model(model) is None else ""


def _dequantised(file: Path, config: Any, metadata: Metadata) -> PreTrainedModel:
    """Load the model in bfloat16, without any sign that it was quantised."""
    dtype = torch.float32 if _computed_in_dtype(metadata["general.architecture"]) else torch.bfloat16
    options: dict[str, Any] = {"config": config, "gguf_file": file.name, "dtype": dtype}
    if hasattr(transformers, "GgufConfig"):  # versions that can compute on packed weights must not do so
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    load = AutoModelForCausalLM.from_pretrained
    loaded, report = _reading(file, lambda: load(file.parent, output_loading_info=True, **options))
    lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if lacking:
        raise UserError(
            f"'{file}' lacks {len(lacking)} of the model's weights, such as {lacking[0]}; give a whole file (not one "
            "of several parts), or download it again"
        )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    loaded = loaded.to(torch.bfloat16)
    with torch.device("meta"):  # no second copy: the weights below take the place of these
        ordinary: PreTrainedModel = type(loaded)(config)
    ordinary.load_state_dict(loaded.state_dict(), assign=True)
    ordinary.tie_weights()
    ordinary.generation_config = loaded.generation_config
    return ordinary


def _computed_in_dtype(architecture: str) -> bool:
    """Return True for architectures whose blocks `transformers` multiplies out in the precision that it is asked for;
    those of others it rounds to that precision once, tensor by tensor."""
    try:
        from transformers.integrations.gguf import is_gguf_arch_supported
    except ImportError:  # versions without the table round once
        return False
    return is_gguf_arch_supported(architecture)


def _quiet() -> contextlib.AbstractContextManager[Any]:
    """Hide the libraries' progress bars if no terminal shows them."""
    return contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())


def _reading(file: Path, read: Callable[[], Any]) -> Any:
    """Return the result of `read`.

    Raises:
        UserError: for any error of the libraries at a file that they cannot read.
    """
    try:
        with _quiet():
            return read()
    except UserError:
        raise
    except Exception as error:  # each of the libraries under here has exceptions of its own
        raise UserError(
            f"'{file}' is damaged, or a GGUF file of a kind that transformers cannot read ({first_line(error)}); "
            "download it again, or give the model's Hugging Face folder"
        ) from error


Metadata = dict[str, Any]
"""A GGUF file's fields by key."""

SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
"""Kinds of splitting (`tokenizer.ggml.pre`) in which every digit is separate and the rest is split as GPT-2 does."""
AS_GPT2 = {
    *("gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "mellum", "modern-bert"),
    *("mpt", "olmo", "jais", "trillion"),
}
"""Kinds that split as GPT-2, which `transformers` does with all kinds that it does not know."""


def tokenizer_of(file: Path, metadata: Metadata) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """Return the tokenizer with its chat template, and warnings about it."""
    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.name_or_path = file.name  # no path of this machine goes into what is saved
    notes = []
    kind = metadata.get("tokenizer.ggml.pre", "default")
    if metadata.get("tokenizer.ggml.model") == "gpt2":
        if kind in SINGLE_DIGITS:
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
                ]
            )
        elif kind not in AS_GPT2 and kind not in _known_to_transformers():
            notes.append(f"its text splitting '{kind}' is unknown here; text is split as GPT-2 does, tokens may differ")
    for which in ("bos", "eos"):
        told = metadata.get(f"tokenizer.ggml.add_{which}_token")
        if told is not None:  # else as `transformers` does
            setattr(tokenizer, f"add_{which}_token", bool(told))
    return tokenizer, notes


def _known_to_transformers() -> set[str]:
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # the table is not part of the library's promises
        return set()
    return set(GGUF_PRE_TOKENIZER_SPLITS)
