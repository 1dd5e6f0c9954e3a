from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_clip import save_tiny
from tutorial import follow

from ovbench import benchmarks
from ovbench.cli.app import run_command
from ovbench.errors import DataError, RunError, UsageError
from ovbench.networks.clip_weights import load_clip
from ovbench.words import embeddings as text
from ovbench.words.prompts import ATTRIBUTES, DEFAULT_ATTRIBUTES, check, described, read, sentence, shipped
from ovbench.words.prompts import descriptions as files
from ovbench.words.prompts.chat import Chat
from ovbench.words.prompts.generate import generate

DATA = sorted((Path(__file__).resolve().parents[1] / "dataset_configs" / "prompts" / "lsmseg").glob("*.json"))


def written(path: Path, classes: dict[str, Any], **fields: Any) -> Path:
    """A file in the format."""
    path.write_text(json.dumps({"format": "ovbench-prompts", "version": 1, "classes": classes, **fields}))
    return path


# --- the shipped data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.stem)
def test_shipped_files_are_complete_and_plain(path: Path) -> None:
    content = json.loads(path.read_text(encoding="ascii"))
    assert (content["format"], content["version"], content["vocabulary"]) == ("ovbench-prompts", 1, path.stem)
    assert tuple(content["attributes"]) == ATTRIBUTES
    assert content["classes"]
    for name, entry in content["classes"].items():
        assert list(entry) == ["called", *ATTRIBUTES], name
        for attribute in ATTRIBUTES:
            phrase = entry[attribute]
            assert 3 <= len(phrase.split()) <= 12, (name, attribute, phrase)
            assert phrase == " ".join(phrase.split()) and phrase[-1] not in ".,;:" and ";" not in phrase, (name, phrase)


def test_no_phrase_is_filler() -> None:
    phrases = Counter(phrase for entry in shipped().entries for phrase in entry.attributes.values())
    assert [phrase for phrase, times in phrases.items() if times > 3] == []
    assert check.phrase_problems(shipped()) == []


@pytest.mark.parametrize("name", benchmarks.names())
def test_every_word_of_every_wording_is_described(name: str) -> None:
    benchmark = benchmarks.get(name)
    words = [word for wording in benchmark.wordings for words in benchmark.words(wording) for word in words]
    assert len(words) >= benchmark.num_classes
    assert check.missing_words(shipped(), {name: words}) == []
    assert all(len(group) == 1 for group in described("lsmseg").sentences(words))  # type: ignore[union-attr]


def test_every_class_of_the_shared_lists_is_described(shared: Path) -> None:
    lists = {path.stem: json.loads(path.read_text()) for path in (shared / "classes").glob("*.json")}
    words = {name: [line.split(",")[0] for line in entries] for name, entries in lists.items() if name != "wordings"}
    assert {"ade847", "context459", "voc20b"} <= set(words)
    for source, of_benchmarks in lists["wordings"].items():
        words |= {
            f"{source} {name}": [word for group in classes for word in group] for name, classes in of_benchmarks.items()
        }
    assert check.missing_words(shipped(), words) == []
    for entry in shipped().entries:
        assert set(entry.attributes) == set(ATTRIBUTES), entry.name


def test_sentences_fit_the_text_encoder() -> None:
    tokens = check.clip_tokens()
    prompts = described("lsmseg")
    assert prompts is not None and prompts.attributes == DEFAULT_ATTRIBUTES == ("size", "shape", "texture", "colour")
    assert check.long_sentences(prompts, tokens) == []
    aliases = [files.without_article(phrase) for entry in shipped().entries for phrase in entry.called]
    assert max(tokens(text) for group in prompts.sentences(aliases) for text in group) <= 77
    # and the check does find one: all nine attributes are too much for most classes
    everything = described("lsmseg:" + "+".join(ATTRIBUTES))
    assert everything is not None
    assert any("tokens, not 77" in line for line in check.long_sentences(everything, tokens))


# --- lookup and sentences -----------------------------------------------------------------------------------------


def test_lookup_by_any_spelling() -> None:
    found = shipped().find
    for word in ("chestofdrawers", "chest of drawers", "Chest of Drawers", "chest-of-drawers", "a chest of drawers"):
        entry = found(word.removeprefix("a "))
        assert entry is not None and entry[1] == "a chest of drawers"
    for word in ("aeroplane", "airplane", "wall-brick", "wallbrick", "casetterecorder", "tv monitor", "background"):
        assert found(word) is not None, word
    car, automobile = found("car"), found("automobile")
    assert car is not None and automobile is not None
    assert automobile[0] is car[0] and (car[1], automobile[1]) == ("a car", "an automobile")
    assert found("zorb") is None


def test_sentences_and_combinations() -> None:
    entry, called = shipped().find("fox") or pytest.fail("no fox")
    size, shape = entry.attributes["size"], entry.attributes["shape"]
    prompts = described("lsmseg:shape+size")
    assert prompts is not None
    assert prompts.sentences(["fox", "fox"]) == [[f"A photo of a fox: {shape}; {size}."]] * 2
    assert sentence(called, ("material",), entry) == f"A photo of a fox: made of {entry.attributes['material']}."
    name = described("lsmseg:name")
    assert name is not None and name.sentences(["chestofdrawers"]) == [["chest of drawers"]]
    assert text.prompts("plain").sentences(["chestofdrawers"]) == [["chestofdrawers"]]
    assert text.prompts("name").sentences(["fox"]) == [["fox"]]
    assert text.prompts("imagenet80").sentences(["fox"])[0][0].count("fox") == 1


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("lsmseg:taste", "Unknown attribute 'taste'"),
        ("lsmseg:colour+colour", "each can be said once"),
        ("lsmseg:", "name attributes after the colon"),
        ("lsmsegg", "Unknown prompts 'lsmsegg'"),
    ],
)
def test_wrong_names_of_prompts(name: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        text.prompts(name)


def test_words_without_a_description_are_all_named() -> None:
    with pytest.raises(UsageError, match=r"1 of 3 words, but not 'zorb', 'blick'\. Write these .*--prompts FILE"):
        text.prompts("lsmseg").sentences(["fox", "zorb", "blick", "zorb"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("apple", "an apple"), ("unicorn", "a unicorn"), ("hourglass", "an hourglass"), ("umbrella", "an umbrella"),
     ("one-way sign", "a one-way sign"), ("urinal", "a urinal"), ("euro coin", "a euro coin"), ("onion", "an onion")],
)  # fmt: skip
def test_article(name: str, expected: str) -> None:
    assert files.with_article(name) == expected
    assert files.without_article(expected) == name


# --- files of one's own -------------------------------------------------------------------------------------------


def test_own_file(tmp_path: Path) -> None:
    path = written(
        tmp_path / "mine.json",
        {
            "zorb": {"colour": "clear plastic", "shape": "large hollow ball"},
            "blick": "A photo of a blick on ice.",
            "ork": ["an ork", "the ork, seen from above"],
        },
        attributes=["colour", "shape"],
    )
    prompts = text.prompts(str(path))
    assert prompts.sentences(["Zorb", "blick", "ork"]) == [
        ["A photo of a zorb: clear plastic; large hollow ball."],
        ["A photo of a blick on ice."],
        ["an ork", "the ork, seen from above"],
    ]
    assert text.prompts(f"{path}:shape").sentences(["zorb"]) == [["A photo of a zorb: large hollow ball."]]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "are no JSON"),
        ("[]", "has no \"format\""),
        ('{"format": "ovbench-prompts", "version": 2, "classes": {}}', "has version 2"),
        ('{"format": "ovbench-prompts", "version": 1}', "no object 'classes'"),
        ('{"format": "ovbench-prompts", "version": 1, "classes": {}, "extra": 1}', "unknown field 'extra'"),
        ('{"format": "ovbench-prompts", "version": 1, "classes": {"a": {"taste": "sour"}}}', "class 'a': unknown attri"),
        ('{"format": "ovbench-prompts", "version": 1, "classes": {"a": {"colour": " red"}}}', "class 'a': 'colour' must"),
        ('{"format": "ovbench-prompts", "version": 1, "classes": {"a": {"colour": 3}}}', "class 'a': 'colour' must"),
        ('{"format": "ovbench-prompts", "version": 1, "classes": {"a": {"called": "a"}}}', "class 'a': 'called' is"),
        ('{"format": "ovbench-prompts", "version": 1, "classes": {"a": []}}', "class 'a': give a sentence"),
        ('{"format": "ovbench-prompts", "version": 1, "classes": {"a": 1}}', "class 'a': an entry is"),
        ('{"format": "ovbench-prompts", "version": 1, "classes": {"a": "x", "a": "y"}}', "has 'a' twice"),
        ('{"format": "ovbench-prompts", "version": 1, "classes": {"a b": "x", "A-B": "y"}}', "'A-B' is written in"),
        ('{"format": "ovbench-prompts", "version": 1, "classes": {"-": "x"}}', "a class has no name"),
    ],
)  # fmt: skip
def test_wrong_files(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(content)
    with pytest.raises(DataError, match=complaint) as error:
        read(path)
    assert "wrong.json" in str(error.value)
    with pytest.raises(DataError):
        text.prompts(str(path))


def test_two_classes_cannot_share_a_synonym(tmp_path: Path) -> None:
    path = written(
        tmp_path / "twice.json", {"bag": {"called": ["a bag", "a grip"]}, "handle": {"called": ["a handle", "a grip"]}}
    )
    with pytest.raises(DataError, match="'handle' and 'bag' are both called 'a grip'"):
        read(path)


def test_attributes_that_are_missing_are_named(tmp_path: Path) -> None:
    path = written(tmp_path / "part.json", {"zorb": {"colour": "clear plastic", "shape": None}})
    with pytest.raises(UsageError, match=r"zorb \(shape\)"):
        text.prompts(f"{path}:colour+shape").sentences(["zorb"])
    assert "part.json, 'zorb': no shape" in check.phrase_problems(read(path))


# --- embeddings ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_clip(str(save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors")))


def test_embeddings_are_the_mean_over_a_words_sentences(clip: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "mine.json", {"cat": ["a cat", "a furry cat"], "dog": "a dog"})
    found = text.embed_words(clip, ["dog", "cat", "dog"], text.prompts(str(path)))
    single = text.embed_words(clip, ["a cat", "a furry cat", "a dog"], ["{}"])
    cat = torch.nn.functional.normalize(single[:2].mean(dim=0), dim=-1)
    torch.testing.assert_close(found, torch.stack([single[2], cat, single[2]]), rtol=1e-4, atol=1e-5)


def test_a_changed_sentence_changes_embedding_and_hash(clip: Any, tmp_path: Path) -> None:
    words = ["cat", "dog"]
    path = written(tmp_path / "mine.json", {"cat": "a cat", "dog": "a dog", "hen": "a hen"})
    before = text.prompts(str(path))
    first, digest = text.embed_words(clip, words, before), before.sha256(words)
    written(path, {"cat": "a cat", "dog": "a dog", "hen": "another hen"})
    assert text.prompts(str(path)).sha256(words) == digest  # not one of the words
    written(path, {"cat": "a cat", "dog": "a small dog", "hen": "a hen"})
    after = text.prompts(str(path))
    second = text.embed_words(clip, words, after)
    assert after.sha256(words) != digest
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])
    hashes = {text.prompts(name).sha256(words) for name in ("lsmseg", "lsmseg:colour", "lsmseg:name", "plain")}
    assert len(hashes) == 4


def test_a_sentence_that_is_too_long_names_its_class(clip: Any, tmp_path: Path) -> None:
    fits, over = "dog " * 75, "dog " * 76  # 77 and 78 tokens with begin and end
    path = written(tmp_path / "long.json", {"cat": fits.strip()})
    assert text.embed_words(clip, ["cat"], text.prompts(str(path))).isfinite().all()
    written(path, {"cat": fits.strip(), "old hen": over.strip()})
    with pytest.raises(UsageError, match=r"class 'old hen' has more than the 77 tokens"):
        text.embed_words(clip, ["cat", "old hen"], text.prompts(str(path)))
    with pytest.raises(UsageError, match="has more than the 77 tokens"):
        text.embed_words(clip, ["hen"], text.prompts("lsmseg:" + "+".join(ATTRIBUTES)))


def test_every_method_takes_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One run of the demo with descriptions: recorded by name and by the content that was used."""
    command = [
        "run",
        "--demo",
        "-m",
        "clip",
        "-d",
        "voc21",
        "--weights",
        "random",
        "--arch",
        "ViT-B-16",
        "--limit",
        "1",
    ]
    command = [*command[:5], "voc21", "--limit", "1", "--device", "cpu", "--gallery", "0", "--json"]
    assert run_command([*command, "--results", str(tmp_path / "runs"), "--prompts", "lsmseg:colour+shape"]) == 0
    protocol = json.loads(capsys.readouterr().out)["spec"]["protocol"]
    words = [word for group in benchmarks.get("voc21").words(protocol["wording"]) for word in group]
    assert protocol["templates"] == "lsmseg:colour+shape"
    assert protocol["templates_sha256"] == text.prompts("lsmseg:colour+shape").sha256(words)


# --- the command line ---------------------------------------------------------------------------------------------


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["prompts", "show", "fox", "--attributes", "colour"]) == 0
    out = capsys.readouterr().out
    entry = (shipped().find("fox") or pytest.fail("no fox"))[0]
    assert out.startswith(f"fox: A photo of a fox: {entry.attributes['colour']}.\n") and "  pattern " in out
    assert run_command(["prompts", "show", "--dataset", "voc20", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {"aeroplane", "person in jeans"} <= {item["word"] for item in shown}
    assert all(list(item["attributes"]) == list(ATTRIBUTES) for item in shown)
    assert run_command(["prompts", "show", "zorb"]) == 2
    assert "'zorb'" in capsys.readouterr().err
    assert run_command(["prompts", "show"]) == 2


def test_check_of_the_shipped_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["prompts", "check"]) == 0
    out = capsys.readouterr().out
    assert "No problems." in out and all(name in out for name in benchmarks.names())
    assert run_command(["prompts", "check", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in data["vocabularies"]}
    assert data["problems"] == [] and rows["all entries"]["most_tokens"] <= 77
    assert rows["voc20b"]["words"] == rows["voc20b"]["described"] > 0


def test_check_of_a_file_finds_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = dict.fromkeys(("size", "shape", "texture"), "an unlikely thing indeed")
    classes: dict[str, Any] = {f"thing {i}": {**good, "colour": f"red number {i}"} for i in range(4)}
    classes["long"] = {**good, "size": "far " * 70 + "too long", "shape": "two words", "texture": "crème brûlée crust"}
    path = written(tmp_path / "mine.json", classes, attributes=["size", "shape", "texture", "colour"])
    assert run_command(["prompts", "check", str(path), "--dataset", "voc20b", "--json"]) == 3
    problems = "\n".join(json.loads(capsys.readouterr().out)["problems"])
    for part in ("voc20b: no entry for 'aeroplane'", "said of 4 classes: thing 0", "72 words", "2 words", "plain ASCII",
                 "'long': no colour"):  # fmt: skip
        assert part in problems, part
    written(path, {"long": "dog " * 90 + "dog"})
    assert run_command(["prompts", "check", str(path), "--json"]) == 3
    assert "tokens, not 77" in capsys.readouterr().out


def test_help_loads_nothing_heavy(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    for arguments in (["prompts", "--help"], ["prompts", "generate", "--help"], ["prompts", "show", "fox"]):
        code = (
            "import sys; from ovbench.cli.app import run_command\n"
            f"status = run_command({arguments!r})\n"
            "print(sorted({'torch', 'open_clip', 'pandas', 'mmseg', 'cv2'} & set(sys.modules)), status, file=sys.stderr)"
        )
        done = run_python("-c", code)
        assert done.stderr.splitlines()[-1] == "[] 0", arguments


def test_the_page(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    outputs = follow(repo / "docs" / "prompts.md", tmp_path / "work")
    assert len(outputs) == 2 and "chest of drawers: A photo of a chest of drawers: " in outputs[0]
    assert "sea otter: A photo of a sea otter: dark brown with a pale face; long body" in outputs[1]


# --- generation against a server of our own -----------------------------------------------------------------------


class Server:
    """A chat endpoint that answers by a function of (question, number of the request) and remembers what came.

    The function gives a text, a status, raw bytes, or a (status, headers) pair.
    """

    def __init__(self, answer: Callable[[str, int], Any]) -> None:
        self.questions: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = body["messages"][-1]["content"]
                server.questions.append(question)
                server.requests.append({"path": self.path, **body})
                server.headers.append(dict(self.headers))
                given = answer(question, len(server.questions))
                status, extra, payload = 200, {}, b""
                if isinstance(given, tuple):
                    status, extra = given
                elif isinstance(given, int):
                    status, payload = given, b'{"error": "no"}'
                elif isinstance(given, bytes):
                    payload = given
                else:
                    payload = json.dumps({"choices": [{"message": {"content": given}}]}).encode()
                self.send_response(status)
                for key, value in {"Content-Length": str(len(payload)), **extra}.items():
                    self.send_header(key, value)
                self.end_headers()
                with suppress(BrokenPipeError):  # a client that was killed
                    self.wfile.write(payload)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    monkeypatch.setenv("OVBENCH_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    servers: list[Server] = []

    def start(answer: Callable[[str, int], Any]) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def polite(question: str, number: int) -> str:
    """A tidy answer that tells questions apart."""
    return f"Answer about {question.split('what ')[1].split(' generally')[0]}."


def quick(server: Server, **fields: Any) -> tuple[Chat, list[float]]:
    """A chat that does not sleep, and the pauses that it would have made."""
    pauses: list[float] = []
    return Chat(server.endpoint, "test-model", pause=pauses.append, **fields), pauses


def test_generate(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(polite)
    chat, _ = quick(server, key="secret-key")
    steps: list[tuple[int, int]] = []
    words = ["walrus", "Walrus", "chestofdrawers"]
    out = tmp_path / "mine.json"
    missing = generate(words, out, chat, attributes=("colour", "shape"), on_classes=lambda *at: steps.append(at))
    assert missing == [] and steps == [(0, 2), (1, 2), (2, 2)]
    assert server.questions[:2] == [
        "Describe what a walrus generally looks like in terms of colour.",
        "Describe what a walrus generally looks like in terms of shape.",
    ]
    assert "what a chest of drawers generally" in server.questions[2]  # spelled for people
    assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}
    assert {request["model"] for request in server.requests} == {"test-model"}
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret-key"}
    found = read(out)
    assert text.prompts(str(out)).sentences(["walrus", "chest of drawers"])[0] == [
        "A photo of a walrus: answer about a walrus; answer about a walrus."
    ]
    assert found.attributes == ("colour", "shape") and len(found.entries) == 2
    stored = [path.read_text() for path in tmp_path.rglob("*.json")]
    assert len(stored) == 5 and not any("secret-key" in content or "127.0.0.1" in content for content in stored)
    assert not list(tmp_path.rglob("*.tmp"))


def test_answers_are_cached_by_content(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(polite)
    chat, _ = quick(server)
    generate(["walrus"], tmp_path / "a.json", chat, attributes=("colour",))
    generate(["walrus"], tmp_path / "b.json", chat, attributes=("colour",))
    assert len(server.questions) == 1
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    generate(["walrus"], tmp_path / "c.json", Chat(server.endpoint, "other-model"), attributes=("colour",))
    assert len(server.questions) == 2
    for path in (tmp_path / "cache" / "prompts").iterdir():
        path.write_text("{broken")
    generate(["walrus"], tmp_path / "d.json", chat, attributes=("colour",))
    assert len(server.questions) == 3


@pytest.mark.parametrize(
    "trouble",
    [
        429,
        500,
        503,
        408,
        b"<html>",
        b'{"choices": []}',
        b'{"choices": [{"message": {"content": null}}]}',
        "  ",
        b"\xff",
    ],
    ids=str,
)
def test_passing_trouble_is_asked_again(serve: Callable[..., Server], tmp_path: Path, trouble: Any) -> None:
    server = serve(lambda question, number: trouble if number <= 3 else polite(question, number))
    chat, pauses = quick(server)
    assert generate(["walrus"], tmp_path / "mine.json", chat, attributes=("colour",)) == []
    assert len(server.questions) == 4 and pauses == [1.0, 2.0, 4.0]


def test_retry_after_is_obeyed_within_reason(serve: Callable[..., Server]) -> None:
    answers = {1: (429, {"Retry-After": "7"}), 2: (429, {"Retry-After": "9999"}), 3: (429, {"Retry-After": "soon"})}
    server = serve(lambda question, number: answers.get(number, "fine"))
    chat, pauses = quick(server)
    assert chat.ask("system", "question") == "fine"
    assert pauses == [7.0, 60.0, 4.0]


def test_lasting_trouble_ends_and_keeps_what_is_done(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(lambda question, number: 500 if "otter" in question else polite(question, number))
    chat, pauses = quick(server)
    out = tmp_path / "mine.json"
    with pytest.raises(RunError, match=r"failed 6 times, last with status 500: .*--resume"):
        generate(["walrus", "sea otter"], out, chat, attributes=("colour",))
    assert [entry.name for entry in read(out).entries] == ["walrus"] and len(pauses) == 5


@pytest.mark.parametrize("refusal", [401, 404, (307, {"Location": "http://127.0.0.1:9/elsewhere"})], ids=str)
def test_a_refusal_ends_at_once(serve: Callable[..., Server], tmp_path: Path, refusal: Any) -> None:
    """A redirect counts as one: the key must not follow it to another host."""
    server = serve(lambda question, number: refusal)
    chat, pauses = quick(server, key="secret-key")
    with pytest.raises(UsageError, match=r"refuses the request with status (401|404|307).*--key-env") as error:
        generate(["walrus"], tmp_path / "mine.json", chat, attributes=("colour",))
    assert len(server.questions) == 1 and pauses == [] and "secret-key" not in str(error.value)
    assert "secret-key" not in repr(chat)


def test_nobody_listens(tmp_path: Path) -> None:
    chat = Chat("http://127.0.0.1:9/v1", "m", attempts=2, pause=lambda seconds: None)
    with pytest.raises(RunError, match="failed 2 times, last with URLError"):
        chat.ask("system", "question")
    with pytest.raises(UsageError, match="give an address"):
        Chat("file:///etc/passwd", "m")


def test_answers_that_are_too_long_are_refused_not_cut(serve: Callable[..., Server], tmp_path: Path) -> None:
    def wordy(question: str, number: int) -> str:
        if "shape" in question:
            return "word " * 13
        return "a brownish grey hide" if "at most 12 words" in question else "word " * 40

    server = serve(wordy)
    chat, _ = quick(server)
    out, told = tmp_path / "mine.json", list[str]()
    missing = generate(["walrus"], out, chat, attributes=("colour", "shape"), on_message=told.append)
    assert missing == ["walrus (shape)"]
    assert [question.split("terms of ")[1] for question in server.questions] == [
        "colour.", "colour. Answer in at most 12 words.",
        "shape.", "shape. Answer in at most 12 words.", "shape. Answer in at most 10 words.",
    ]  # fmt: skip
    assert told[0] == "a walrus, colour: refused an answer of 40 words." and len(told) == 4
    entry = json.loads(out.read_text())["classes"]["walrus"]
    assert (entry["colour"], entry["shape"]) == ("a brownish grey hide", None)
    # what is missing is asked for again, the rest is not
    server.questions.clear()
    generate(["walrus"], out, quick(serve(polite))[0], attributes=("colour", "shape"), resume=True)
    assert server.questions == [] and read(out).entries[0].attributes["shape"] == "answer about a walrus"


def test_resume_is_asked_for_and_must_fit(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(polite)
    chat, _ = quick(server)
    out = tmp_path / "mine.json"
    generate(["walrus"], out, chat, attributes=("colour",))
    with pytest.raises(UsageError, match="exists already: go on with --resume"):
        generate(["walrus", "seal"], out, chat, attributes=("colour",))
    with pytest.raises(UsageError, match="made with attributes"):
        generate(["walrus", "seal"], out, chat, attributes=("shape",), resume=True)
    with pytest.raises(UsageError, match="made with model 'test-model'"):
        generate(["seal"], out, Chat(server.endpoint, "other"), attributes=("colour",), resume=True)
    out.write_text("{")
    with pytest.raises(DataError, match="no JSON"):
        generate(["seal"], out, chat, attributes=("colour",), resume=True)


def test_killed_and_resumed(serve: Callable[..., Server], tmp_path: Path) -> None:
    """A process killed between two answers leaves a whole file, and nothing that it got is asked for again."""
    hold = threading.Event()

    def slow(question: str, number: int) -> str:
        if number == 6:  # second attribute of the third class
            hold.wait(30)
        return polite(question, number)

    server = serve(slow)
    out = tmp_path / "mine.json"
    (tmp_path / "classes.txt").write_text("walrus\nseal\nriver otter: otter\n")
    command = [
        sys.executable, "-m", "ovbench", "prompts", "generate", "--classes", "classes.txt", "--endpoint", server.endpoint,
        "--model", "test-model", "--out", str(out), "--attributes", "colour+shape", "--key-env", "MY_KEY",
    ]  # fmt: skip
    environment = {**os.environ, "MY_KEY": "secret-key"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(server.questions) < 6 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hold.set()
    assert [entry.name for entry in read(out).entries] == ["walrus", "seal"]
    asked = len(server.questions)
    done = subprocess.run([*command, "--resume"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}\n"
    assert [entry.name for entry in read(out).entries] == ["walrus", "seal", "river otter", "otter"]
    assert [question.split("what ")[1].split(" generally")[0] for question in server.questions[asked:]] == [
        "a river otter", "an otter", "an otter",  # the third class's colour was in the cache
    ]  # fmt: skip
    assert not any("secret-key" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--model", "m", "--endpoint", "http://h/v1"], "Which classes"),
        (["--model", "m", "--endpoint", "http://h/v1", "--classes", "a", "--key-env", "NO_SUCH_KEY"], "'NO_SUCH_KEY'"),
        (["--model", "m", "--endpoint", "h/v1", "--classes", "a"], "give an address"),
        (["--model", "m", "--classes", "a"], "--endpoint"),
        (["--model", "m", "--endpoint", "http://h/v1", "--classes", "a", "--attributes", "taste"], "Unknown attribute"),
        (["--model", "m", "--endpoint", "http://h/v1", "--classes", "a", "--attributes", "name"], "nothing to ask"),
    ],
)
def test_generate_refuses_wrong_options(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["prompts", "generate", *arguments]) == 2
    assert complaint in capsys.readouterr().err
