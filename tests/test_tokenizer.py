"""Tokenizers: exact round trips, reproducible training, saving and loading, and what the user may get wrong."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ais_megatron.config import Config, TaskConfig, build_config
from ais_megatron.tasks import make_task
from ais_megatron.tasks.extraction import find_answer
from ais_megatron.tokenizer import MODEL_FILE, HFTokenizer, SentencePieceTokenizer, make_tokenizer, response_text
from tests.helpers.tokenizers import THINKING_TEMPLATE, hf_folder

TAGS = ("<answer>", "</answer>")


def config_of(tmp_path: Path, vocab_size: int = 64, **tokenizer: object) -> Config:
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    architecture = {"vocab_size": vocab_size, **dict.fromkeys(sizes, 2)}
    return build_config({"model": {"architecture": architecture}, "sft": {"cache_dir": str(tmp_path)}, "tokenizer": tokenizer})


def test_countdown_tokens_are_characters_and_tags(tmp_path: Path):
    task = make_task(TaskConfig(name="countdown"), 0)
    tokenizer = make_tokenizer(config_of(tmp_path), task)
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id) == (24, 0, 1)  # pad, eos, unk, 2 tags, 19 characters
    prompt, response = tokenizer.encode_prompt("93 30 16=79:"), tokenizer.encode_response("<answer>93-30+16</answer>")
    assert len(prompt) == 12 and len(response) == 1 + 8 + 1 + 1 and response[-1] == 1
    longest = tokenizer.encode_prompt("100 100 100=100:") + tokenizer.encode_response("<answer>(100+100)/100</answer>")
    assert len(longest) == 32


@pytest.mark.parametrize("name", ["countdown", "sudoku"])
def test_prompt_and_response_decode_to_exactly_their_texts(tmp_path: Path, name: str):
    task = make_task(TaskConfig(name=name), 0)
    tokenizer = make_tokenizer(config_of(tmp_path), task)
    for problem in [task.train_problem(index) for index in range(200)] + task.test_problems(50):
        prompt, response = tokenizer.encode_prompt(problem.text), tokenizer.encode_response(problem.solution)
        assert tokenizer.decode(prompt + response) == problem.text + problem.solution
        assert tokenizer.decode(response) == problem.solution
        assert len(prompt + response) < 48


def test_word_pieces_keep_every_character(tmp_path: Path):
    lines = ["How many eggs are there?\n  She has 16 eggs,\tand €3. <answer>16</answer>"] * 20
    tokenizer = SentencePieceTokenizer.train(lines, 400, TAGS, tmp_path / "a.model", model_type="unigram")
    for text in (lines[0], " leading", "trailing  ", "\n\n a", "never seen: \u2028 é 漢 🙂", "123", "<answer>", ""):
        assert tokenizer.decode(tokenizer.encode_prompt(text)) == text
        assert tokenizer.decode([*tokenizer.encode_prompt(" x "), *tokenizer.encode_response(text)]) == " x " + text
    assert len(tokenizer.encode_prompt("2024")) >= 4  # one token a digit
    assert len(tokenizer.encode_response("<answer>")) == 2


def test_training_is_reproducible_and_racing_ranks_agree(tmp_path: Path):
    lines = make_task(TaskConfig(name="countdown"), 0).tokenizer_corpus(50)
    for name in "ab":
        SentencePieceTokenizer.train(lines, 64, TAGS, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    cache = tmp_path / "cache"
    with ThreadPoolExecutor(4) as pool:
        task = make_task(TaskConfig(name="countdown"), 0)
        tokenizers = list(pool.map(lambda _: make_tokenizer(config_of(cache), task), range(4)))
    assert len({tuple(t.encode_prompt("1 2 3=6:")) for t in tokenizers}) == 1
    (model,) = cache.iterdir()  # one model, no temporary files
    modified = model.stat().st_mtime_ns
    make_tokenizer(config_of(cache), task)
    assert model.stat().st_mtime_ns == modified  # used again, not trained again


def test_sentencepiece_survives_a_trip_through_a_folder(tmp_path: Path):
    trained = SentencePieceTokenizer.train(["0123456789 +"], 64, TAGS, tmp_path / "a.model")
    trained.save(tmp_path / "saved")
    for path in (tmp_path / "a.model", tmp_path / "saved" / MODEL_FILE):
        loaded = SentencePieceTokenizer.load(path)
        assert loaded.encode_response("<answer>1 + 2</answer>") == trained.encode_response("<answer>1 + 2</answer>")


def test_any_ids_decode(tmp_path: Path):
    tokenizer = SentencePieceTokenizer.train(["0123456789 +"], 64, TAGS, tmp_path / "a.model")
    one = tokenizer.encode_prompt("1")
    assert tokenizer.decode([0, *one, 1, *one, 0, 0]) == "11"
    assert tokenizer.decode([]) == ""
    beyond = tokenizer.decode([*one, tokenizer.vocab_size + 7, *one])  # models may have more ids than the tokenizer
    assert beyond != "11" and beyond[0] == beyond[-1] == "1"


def test_vocabulary_limits_name_both_sizes(tmp_path: Path):
    task = make_task(TaskConfig(name="countdown"), 0)
    with pytest.raises(ValueError, match=r"model\.architecture\.vocab_size=20.*raise it to at least 24"):
        make_tokenizer(config_of(tmp_path, vocab_size=20), task)
    make_tokenizer(config_of(tmp_path, vocab_size=24), task).save(tmp_path / "t")
    with pytest.raises(ValueError, match=r"vocab_size=23: smaller than the tokenizer's 24 tokens"):
        make_tokenizer(config_of(tmp_path, vocab_size=23, path=str(tmp_path / "t" / "tokenizer.model")), task)


def test_unusable_sentencepiece_files(tmp_path: Path):
    with pytest.raises(ValueError, match="no such file"):
        SentencePieceTokenizer.load(tmp_path / "none.model")
    (tmp_path / "junk.model").write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        SentencePieceTokenizer.load(tmp_path / "junk.model")
    with pytest.raises(ValueError, match="without text"):
        SentencePieceTokenizer.train([""], 64, TAGS, tmp_path / "a.model")


def test_sentencepiece_model_that_changes_white_space_is_refused(tmp_path: Path):
    from sentencepiece import SentencePieceTrainer

    lines = ["0 1 2 3", "4 5 6 7", "8 9"]
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "default"), vocab_size=20, model_type="char", hard_vocab_limit=False
    )
    with pytest.raises(ValueError, match="add_dummy_prefix=false"):
        SentencePieceTokenizer.load(tmp_path / "default.model")


def test_hf_tokenizer_without_a_chat_template(tmp_path: Path):
    tokenizer = HFTokenizer(hf_folder(tmp_path, eos_token="<eos>", pad_token="<pad>"))
    assert tokenizer.vocab_size == 258 and {tokenizer.eos_id, tokenizer.pad_id} == {256, 257}
    text = "a  b\n é <answer> , ."
    prompt, response = tokenizer.encode_prompt(text), tokenizer.encode_response(" 1")
    assert len(prompt) == len(text.encode()) and response[-1] == tokenizer.eos_id
    assert tokenizer.decode([*prompt, *response, tokenizer.pad_id]) == text + " 1"
    assert tokenizer.decode([*response, 999]).startswith(" 1")


def test_hf_tokenizer_applies_its_chat_template_to_prompts_only(tmp_path: Path):
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    tokenizer = HFTokenizer(hf_folder(tmp_path / "a", template, eos_token="<eos>"))
    assert tokenizer.pad_id == tokenizer.eos_id
    assert tokenizer.decode(tokenizer.encode_prompt("hi")) == "[user]hi[assistant]"
    assert tokenizer.decode(tokenizer.encode_response("hi")) == "hi"

    tokenizer.save(tmp_path / "b")
    assert HFTokenizer(tmp_path / "b").encode_prompt("hi") == tokenizer.encode_prompt("hi")

    config = config_of(tmp_path, vocab_size=300, kind="hf", path=str(tmp_path / "b"))
    assert make_tokenizer(config, make_task(TaskConfig(), 0)).vocab_size == 257
    with pytest.raises(ValueError, match=r"vocab_size=64: smaller than the tokenizer's 257 tokens.*kind=hf"):
        make_tokenizer(config_of(tmp_path, kind="hf", path=str(tmp_path / "b")), make_task(TaskConfig(), 0))


@pytest.mark.parametrize(("end", "opened"), [("<think>\\n", True), ("<think>", True), ("<think></think>\\n", False), ("", False)])
def test_a_thought_that_the_prompt_opens_is_a_thought(tmp_path: Path, end: str, opened: bool):
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[A]{{ '" + end + "' }}{% endif %}"
    )
    tokenizer = HFTokenizer(hf_folder(tmp_path, template, eos_token="<eos>"))
    text = response_text(tokenizer, tokenizer.encode_prompt("hi"), tokenizer.encode_response("<answer>1</answer>"))
    assert text == "<think>" * opened + "<answer>1</answer>"
    assert (find_answer(text, 9).answer is None) == opened


def test_all_end_of_sequence_tokens_of_the_generation_config_end_a_response(tmp_path: Path):
    folder = hf_folder(tmp_path / "a", eos_token="<eos>", pad_token="<pad>")
    eos, pad = HFTokenizer(folder).eos_id, HFTokenizer(folder).pad_id
    for name, written, expected in [
        ("config.json", 65, (eos, 65)),  # without a generation_config.json, as in transformers
        ("generation_config.json", [66, eos, 67], (eos, 66, 67)),
        ("generation_config.json", 66, (eos, 66)),
        ("generation_config.json", None, (eos,)),
    ]:
        (folder / name).write_text(json.dumps({"eos_token_id": written}))
        assert HFTokenizer(folder).eos_ids == expected
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [65, 66]}))
    tokenizer = HFTokenizer(folder)
    assert tokenizer.decode([72, 65, 73, 66, pad, eos]) == tokenizer.decode([72, 73])
    assert tokenizer.encode_response("x")[-1] == eos
    elsewhere = hf_folder(tmp_path / "b", eos_token="<eos>", pad_token="<pad>")
    assert HFTokenizer(elsewhere, model_folder=folder).eos_ids == (eos, 65, 66)
    for bad, message in [("{", "not a valid JSON object"), ('{"eos_token_id": ["2"]}', r"eos_token_id=\['2'\] must be a token id")]:
        (folder / "generation_config.json").write_text(bad)
        with pytest.raises(ValueError, match=rf"generation_config\.json: {message}"):
            HFTokenizer(folder)


def test_unusable_hf_folders(tmp_path: Path):
    with pytest.raises(ValueError, match="no such folder"):
        HFTokenizer(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be loaded"):
        HFTokenizer(tmp_path / "empty")
    with pytest.raises(ValueError, match="no eos_token"):
        HFTokenizer(hf_folder(tmp_path / "no_eos", pad_token="<pad>"))


def test_turns_a_system_prompt_and_template_kwargs_reach_the_template(tmp_path: Path):
    folder = hf_folder(tmp_path, THINKING_TEMPLATE, eos_token="<|im_end|>")

    def text(prompt, *arguments):  # noqa: ANN001, ANN202
        tokenizer = HFTokenizer(folder, None, *arguments)
        return tokenizer._tokenizer.decode(tokenizer.encode_prompt(prompt))

    user, assistant = "<|im_start|>user\n1+1?<|im_end|>\n", "<|im_start|>assistant\n"
    assert text("1+1?") == user + assistant
    assert text("1+1?", None, {"enable_thinking": True}) == user + assistant
    assert text("1+1?", None, {"enable_thinking": False}) == user + assistant + "<think>\n\n</think>\n\n"
    assert text("1+1?", "Be brief.") == "<|im_start|>system\nBe brief.<|im_end|>\n" + user + assistant
    assert text("1+1?", "") == "<|im_start|>system\n<|im_end|>\n" + user + assistant
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "1+1?"}]
    assert text(own, "Be brief.") == "<|im_start|>system\nMine.<|im_end|>\n" + user + assistant
    config = build_config(
        {
            "model": {"architecture": config_of(tmp_path, vocab_size=300).architecture.model_dump()},
            "tokenizer": {"kind": "hf", "path": str(folder)},
            "task": {"template_kwargs": {"enable_thinking": False}, "system_prompt": "S"},
        }
    )
    made = make_tokenizer(config, make_task(config.task, 0))
    assert made.encode_prompt("x") == HFTokenizer(folder, None, "S", {"enable_thinking": False}).encode_prompt("x")


def test_what_a_chat_template_lacks_or_refuses(tmp_path: Path):
    thinking = hf_folder(tmp_path / "thinking", THINKING_TEMPLATE, eos_token="<|im_end|>")
    with pytest.raises(
        ValueError,
        match=r"^task\.template_kwargs: the chat template of tokenizer\.path=.*thinking never reads 'enable_thinkin'; it reads "
        r"enable_thinking; did you mean enable_thinking\?$",
    ):
        HFTokenizer(thinking, None, None, {"enable_thinkin": False})
    plain = hf_folder(tmp_path / "plain", eos_token="<eos>")
    with pytest.raises(ValueError, match="no chat template, so task.system_prompt and task.template_kwargs cannot be used"):
        HFTokenizer(plain, None, "Be brief.", {"x": 1})
    with pytest.raises(ValueError, match="plain: this tokenizer has no chat template, so a prompt of several turns cannot be rendered"):
        HFTokenizer(plain).encode_prompt([{"role": "user", "content": "1"}])
    refusing = hf_folder(
        tmp_path / "refusing",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ company + messages[0].content }}",
        eos_token="<eos>",
    )
    for system_prompt, given, complaint in (
        ("S", {"company": "c"}, r"no system role; give the variables that it needs in task\.template_kwargs \(now: company\)"),
        (None, {}, r"'company' is undefined; .* \(now: nothing\)"),
    ):
        with pytest.raises(ValueError, match=rf"tokenizer\.path=.*refusing: its chat template refuses the prompt: {complaint}"):
            HFTokenizer(refusing, None, system_prompt, given).encode_prompt("1")
    pieces = SentencePieceTokenizer.train(["0123456789 +"], 64, TAGS, tmp_path / "a.model")
    with pytest.raises(ValueError, match="tokenizer.kind=sentencepiece: has no chat template"):
        pieces.encode_prompt([{"role": "user", "content": "1"}])
