"""Tokenizers: a small SentencePiece model for models that are trained from scratch, or a Hugging Face tokenizer.

Prompt and response are encoded separately. The engine samples the response's tokens after the prompt, so no token may contain parts of
both. `decode(encode_prompt(p) + encode_response(r)) == p + r` holds exactly for SentencePiece. A Hugging Face chat template adds its own
turns to the prompt.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ais_megatron.config import Config
from ais_megatron.config.chat_template import conversation, keyword_problems, refusal
from ais_megatron.config.hf_config import generation_config, read_eos_ids
from ais_megatron.tasks.extraction import THINK
from ais_megatron.tasks.task import Task

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerBase

MODEL_FILE = "tokenizer.model"
CORPUS_LINES = 2000
THINK_TAIL = 16  # tokens at the end of a prompt in which its <think> stands, if it has one
MAX_CHAR_ALPHABET = 64  # with at most this many characters, one piece per character; otherwise word pieces

ModelType = Literal["char", "unigram"]
Turns = Sequence[Mapping[str, Any]]
"""Turns of a conversation, each with `role` and `content`."""


class Tokenizer(Protocol):
    """Converts text to token ids and back."""

    vocab_size: int
    """Number of ids, at most that of the model."""
    eos_id: int
    """The token that ends a response, the last one of `encode_response`."""
    eos_ids: tuple[int, ...]
    """All tokens at which an engine ends a response. The first one is `eos_id`."""
    pad_id: int
    """The token that pads a batch; may equal `eos_id`."""

    def encode_prompt(self, prompt: str | Turns) -> list[int]:
        """Token ids of a prompt, without an end-of-sequence token. A text is one turn of the user. Only a chat template can render
        several turns."""

    def encode_response(self, text: str) -> list[int]:
        """Token ids of a response. The last one is `eos_id`."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of any ids, without `eos_ids` and `pad_id`. Ids without a meaning become visible garbage."""

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer: MODEL_FILE, or the files of a Hugging Face tokenizer."""


class SentencePieceTokenizer:
    """A SentencePiece `.model` file, which also contains the special ids."""

    def __init__(self, model: bytes, source: str = "tokenizer") -> None:
        """model: the contents of a .model file. source: its name, for messages. Raises ValueError if it cannot be used."""
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor: SentencePieceProcessor = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"{source}: not a SentencePiece model ({error})") from error
        self._model = model
        self.vocab_size = self._processor.get_piece_size()
        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            raise ValueError(f"{source}: the model has no end-of-sequence piece; train it with eos_id >= 0")
        self.eos_ids: tuple[int, ...] = (self.eos_id,)
        pad_id = self._processor.pad_id()
        self.pad_id = pad_id if pad_id >= 0 else self.eos_id
        knows_space = self._processor.unk_id() not in self._processor.encode(" ")  # for example, Sudoku's texts have no spaces
        prompt, response = (" 1 ", "  2") if knows_space else ("1", "2")
        if self.decode(self.encode_prompt(prompt) + self.encode_response(response)) != prompt + response:
            raise ValueError(
                f"{source}: the model changes white space or does not know digits; train it with "
                "normalization_rule_name=identity, add_dummy_prefix=false, remove_extra_whitespaces=false"
            )

    @classmethod
    def load(cls, path: str | Path) -> SentencePieceTokenizer:
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"tokenizer.path={path}: no such file; give a SentencePiece .model file, or leave it empty to train one")
        return cls(path.read_bytes(), source=f"tokenizer.path={path}")

    @classmethod
    def train(
        cls, lines: Sequence[str], vocab_size: int, special_pieces: Sequence[str], path: str | Path, model_type: ModelType = "char"
    ) -> SentencePieceTokenizer:
        """Train on `lines`, write the model to `path` and return it. The same arguments give the same bytes.

        Args:
            vocab_size: the largest number of pieces. A small corpus gives fewer.
            special_pieces: texts that are always one piece, such as "<answer>".
            model_type: "char": one piece per character of `lines`. "unigram": word pieces, and bytes for characters that are not in
                `lines`, so that nothing is unknown.
        Raises:
            ValueError: there is no text, or `vocab_size` is too small for the characters of `lines`.
        """
        tokenizer = cls(_train(lines, vocab_size, special_pieces, model_type), source=str(path))
        _write_atomically(Path(path), tokenizer._model)
        return tokenizer

    def encode_prompt(self, prompt: str | Turns) -> list[int]:
        if not isinstance(prompt, str):
            raise ValueError(
                "tokenizer.kind=sentencepiece: has no chat template, so a prompt of several turns cannot be rendered; set "
                "tokenizer.kind=hf with the tokenizer of a model that was trained to chat"
            )
        return self._processor.encode(prompt)

    def encode_response(self, text: str) -> list[int]:
        return [*self._processor.encode(text), self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        # A model's vocabulary may be larger than ours. An id beyond ours is unknown, and not an error.
        unknown = self._processor.unk_id()
        kept = [int(i) if 0 <= i < self.vocab_size else unknown for i in ids if i not in (self.eos_id, self.pad_id)]
        return self._processor.decode(kept)

    def save(self, folder: str | Path) -> None:
        _write_atomically(Path(folder) / MODEL_FILE, self._model)


class HFTokenizer:
    """The tokenizer in a Hugging Face checkpoint folder, used offline. If it has a chat template, the template wraps every prompt."""

    def __init__(
        self,
        folder: str | Path,
        model_folder: str | Path | None = None,
        system_prompt: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            model_folder: the model's folder, if it is another one. Its files tell which tokens end a response if those in `folder` do not.
            system_prompt: the first turn of every conversation that has no system turn of its own.
            template_kwargs: variables for the chat template.
        Raises:
            ValueError: the folder has no usable tokenizer, the tokenizer has no end-of-sequence token, or its chat template does not
                read one of `template_kwargs`.
        """
        from transformers import AutoTokenizer

        if not Path(folder).is_dir():
            raise ValueError(
                f"tokenizer.path={folder}: no such folder; give the folder of a Hugging Face tokenizer (nothing is downloaded)"
            )
        try:
            self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
            raise ValueError(f"tokenizer.path={folder}: cannot be loaded as a Hugging Face tokenizer ({error})") from error
        if self._tokenizer.eos_token_id is None:
            raise ValueError(f"tokenizer.path={folder}: the tokenizer has no eos_token; set it in tokenizer_config.json")
        self.vocab_size = len(self._tokenizer)
        self.eos_id = int(self._tokenizer.eos_token_id)
        self.eos_ids = tuple(dict.fromkeys([self.eos_id, *read_eos_ids(folder, model_folder)]))
        pad_id = self._tokenizer.pad_token_id
        self.pad_id = self.eos_id if pad_id is None else int(pad_id)
        self._where = f"tokenizer.path={folder}"
        self._system_prompt, self._template_kwargs = system_prompt, dict(template_kwargs or {})
        template = self._tokenizer.get_chat_template() if self._tokenizer.chat_template is not None else None
        if problems := keyword_problems(template, self._template_kwargs, system_prompt is not None, self._where):
            raise ValueError("\n".join(problems))

    def encode_prompt(self, prompt: str | Turns) -> list[int]:
        from jinja2 import TemplateError

        if self._tokenizer.chat_template is None:
            if not isinstance(prompt, str):
                raise ValueError(
                    f"{self._where}: this tokenizer has no chat template, so a prompt of several turns cannot be rendered; give the "
                    "tokenizer of a model that was trained to chat"
                )
            return self._tokenizer.encode(prompt)
        turns = conversation([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, self._system_prompt)
        try:
            ids = self._tokenizer.apply_chat_template(
                [dict(turn) for turn in turns], add_generation_prompt=True, tokenize=True, return_dict=False, **self._template_kwargs
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(refusal(self._where, error, self._template_kwargs)) from error
        return list(ids)

    def encode_response(self, text: str) -> list[int]:
        return [*self._tokenizer.encode(text, add_special_tokens=False), self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        kept = [int(i) for i in ids if i not in (*self.eos_ids, self.pad_id)]
        return self._tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def save(self, folder: str | Path) -> None:
        self._tokenizer.save_pretrained(str(folder))
        content = generation_config(self.eos_ids, self.pad_id)  # so that a checkpoint knows them without the model's folder
        (Path(folder) / "generation_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def response_text(tokenizer: Tokenizer, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
    """A response as it is judged. If the chat template ends every prompt with ``<think>``, the model does not write it. Then the text
    begins with it all the same, so that a thought that was cut at the limit is not taken for an answer."""
    opened = tokenizer.decode(prompt_ids[-THINK_TAIL:]).rstrip().endswith(THINK)
    return THINK * opened + tokenizer.decode(response_ids)


def make_tokenizer(config: Config, task: Task) -> Tokenizer:
    """The tokenizer of `config`. Without tokenizer.path, a SentencePiece model is trained on the task's own texts.

    A trained model is kept in sft.cache_dir under a hash of everything that determines it. All ranks may call this at the same time.

    Raises:
        ValueError: the file or folder cannot be used, or there are more tokens than model.architecture.vocab_size.
    """
    limit = config.architecture.vocab_size
    if config.tokenizer.kind == "sentencepiece" and config.architecture.mask_token_id is not None:
        limit = config.architecture.mask_token_id  # such a tokenizer has no mask token, so the model's must come after its tokens
    path = config.tokenizer.path
    if config.tokenizer.kind == "hf":
        folder = path or config.model.path
        assert folder is not None  # the configuration's own check
        tokenizer: Tokenizer = HFTokenizer(folder, config.model.path, config.task.system_prompt, config.task.template_kwargs)
    elif path is not None:
        tokenizer = SentencePieceTokenizer.load(path)
    else:
        tokenizer = _train_or_load(task, limit, Path(config.sft.cache_dir))
    if tokenizer.vocab_size > limit:
        name = "vocab_size" if limit == config.architecture.vocab_size else "mask_token_id"
        raise ValueError(
            f"model.architecture.{name}={limit}: smaller than the tokenizer's {tokenizer.vocab_size} tokens "
            f"(tokenizer.kind={config.tokenizer.kind}, tokenizer.path={path}); raise it to at least {tokenizer.vocab_size}"
        )
    return tokenizer


def _train_or_load(task: Task, vocab_size: int, cache: Path) -> SentencePieceTokenizer:
    import sentencepiece

    lines = task.tokenizer_corpus(CORPUS_LINES)
    # Puzzles use about twenty characters. With one token per character, a tiny model sees every digit in its place.
    model_type: ModelType = "char" if len(_characters(lines, task.special_pieces)) <= MAX_CHAR_ALPHABET else "unigram"
    recipe = json.dumps([lines, vocab_size, list(task.special_pieces), model_type, sentencepiece.__version__])
    path = cache / f"tokenizer-{task.name}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.model"
    if path.is_file():
        return SentencePieceTokenizer.load(path)
    return SentencePieceTokenizer.train(lines, vocab_size, task.special_pieces, path, model_type)


def _characters(lines: Sequence[str], special_pieces: Sequence[str]) -> set[str]:
    """The characters of `lines` outside the special pieces."""
    return set().union(*(re.sub("|".join(map(re.escape, special_pieces)), "", line) if special_pieces else line for line in lines))


def _train(lines: Sequence[str], vocab_size: int, special_pieces: Sequence[str], model_type: ModelType) -> bytes:
    """The bytes of a trained model; see `SentencePieceTokenizer.train`."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    if not any(lines):
        raise ValueError("cannot train a tokenizer without text")
    buffer = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=buffer,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,  # small corpora have fewer pieces
            user_defined_symbols=list(special_pieces),
            pad_id=0,  # the padding of `Batch`
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            byte_fallback=model_type != "char",
            character_coverage=1.0,
            split_digits=True,
            # The next three options make decoding exact.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 20,  # in bytes; longer lines would be skipped
            num_threads=1,  # so that the order of summation, and with it the model, does not vary
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"model.architecture.vocab_size={vocab_size}: no tokenizer can be trained on the task's text ({error}); raise it"
        ) from error
    processor = SentencePieceProcessor(model_proto=buffer.getvalue())
    # "char" keeps the most frequent characters that fit, and silently drops the others.
    plain = _characters(lines, special_pieces)
    lost = {character for character in plain if processor.unk_id() in processor.encode(character)}
    if lost:
        raise ValueError(
            f"model.architecture.vocab_size={vocab_size}: too small for the task's text, which also needs {''.join(sorted(lost))!r}; "
            f"raise it to at least {vocab_size + len(lost)}"
        )
    return buffer.getvalue()


def _write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that another process sees the old file or the new one, and never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)  # with mkstemp's 0600 other users could not read a shared cache
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
