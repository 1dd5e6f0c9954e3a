from __future__ import annotations

import errno
import json
import os
import stat

import pytest

from ovbench.errors import DataError, RunError
from ovbench.results import store


def test_write_and_read(make_record, tmp_path):
    record = make_record(method="sc-clip", dataset="voc21")
    path = store.write(record, tmp_path / "runs")
    assert path == tmp_path / "runs" / "sc-clip" / "voc21" / f"{record.run_id}.json"
    assert store.read(path) == record
    assert path.read_text(encoding="utf-8") == record.to_json()
    assert [item.name for item in path.parent.iterdir()] == [path.name], "a temporary file was left behind"
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~store._umask()


def test_records_come_back_in_order(make_record, tmp_path):
    records = [make_record(method=method) for method in ("sc-clip", "clip", "sc-clip")]
    for record in records:
        store.write(record, tmp_path)
    found = store.load_all(tmp_path)
    assert [(item.spec.method, item.run_id) for item in found] == sorted(
        (item.spec.method, item.run_id) for item in records
    )


def test_a_missing_folder_holds_no_records(tmp_path):
    assert store.load_all(tmp_path / "nowhere") == []


def test_a_broken_file_is_named_and_the_others_are_read(make_record, tmp_path):
    good = make_record()
    path = store.write(good, tmp_path)
    path.with_name("cut.json").write_text(good.to_json()[:100], encoding="utf-8")
    path.with_name("list.json").write_text("[]", encoding="utf-8")
    path.with_name("binary.json").write_bytes(b"\xff\xfe")
    wrong = json.loads(good.to_json())
    wrong["metrics"]["miou"] = "high"
    path.with_name("wrong.json").write_text(json.dumps(wrong), encoding="utf-8")
    path.with_name("new.json").write_text(json.dumps({**wrong, "schema_version": 7}), encoding="utf-8")
    problems: list[str] = []
    assert store.load_all(tmp_path, on_problem=problems.append) == [good]
    assert len(problems) == 5
    for name, words in {
        "binary.json": "no valid JSON",
        "cut.json": "no valid JSON",
        "list.json": "no object",
        "new.json": "schema version 7",
        "wrong.json": "metrics.miou",
    }.items():
        (message,) = [problem for problem in problems if name in problem]
        assert words in message
    with pytest.warns(UserWarning) as seen:
        store.load_all(tmp_path)
    assert sorted(str(warning.message) for warning in seen) == sorted(problems)


def test_reading_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"none\.json.*No such file"):
        store.read(tmp_path / "none.json")


def test_the_stored_hash_must_be_that_of_the_spec(make_record, tmp_path):
    with pytest.raises(ValueError, match="not the hash"):
        store.write(make_record(spec_hash="0" * 64), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.EACCES, "no permission"), (errno.EROFS, "no permission"), (errno.ENOSPC, "no space left")],
)
def test_a_failed_write_says_why_and_leaves_nothing(make_record, tmp_path, monkeypatch, code, words):
    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(store.os, "fsync", refuse)
    record = make_record()
    with pytest.raises(RunError, match=f"{words}.*--results DIR"):
        store.write(record, tmp_path)
    assert list(store.record_path(record, tmp_path).parent.iterdir()) == []


def test_a_crash_while_replacing_keeps_the_old_record(make_record, tmp_path, monkeypatch):
    record = make_record()
    path = store.write(record, tmp_path)
    before = path.read_bytes()

    def crash(source: str, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        store.write(record.model_copy(update={"reason": "again"}), tmp_path)
    assert path.read_bytes() == before
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_a_results_folder_that_is_a_file(make_record, tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(RunError, match="is a file"):
        store.ensure_writable(tmp_path / "runs")
    with pytest.raises(RunError, match="is a file"):
        store.write(make_record(), tmp_path / "runs")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="no permission"):
        store.ensure_writable(tmp_path / "runs")


def test_ensure_writable_makes_the_folder_and_leaves_it_empty(tmp_path):
    store.ensure_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "safe"),
    [("sc-clip", "sc-clip"), ("org/name", "org-name"), ("../up", "-up"), ("...", "unnamed"), ("a b\n", "a-b-")],
)
def test_names_become_one_plain_path_component(name, safe):
    assert store.path_name(name) == safe
