import json
import os
import re
import subprocess
import sys

import pytest
import torch

import mil_anchor.environment
from mil_anchor.environment import environment, read_environment, write_environment
from tests.composing import ROOT


def test_environment__in_the_checkout__says_what_a_result_depends_on(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/somebody/run.py", "model=abmil", "names.data=my set"])

    found = environment()

    assert found["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert found["torch"] == torch.__version__
    assert found["n_threads"] == torch.get_num_threads()
    assert 1 <= found["n_cores"] <= os.cpu_count()
    assert found["command"] == "run.py model=abmil 'names.data=my set'"
    assert found["processor"]
    assert all(isinstance(value, str | int) for value in found.values())


def test_environment__git__says_commit_and_whether_files_differ(tmp_path, monkeypatch):
    def git(*arguments):
        done = subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    monkeypatch.setattr(mil_anchor.environment, "_ROOT", tmp_path)

    clean = environment()
    (tmp_path / "new").write_text("1")
    still_clean = environment()
    (tmp_path / "file").write_text("2")
    changed = environment()

    assert clean["commit"] == git("rev-parse", "HEAD")
    assert [found["changed"] for found in (clean, still_clean, changed)] == [False, False, True]


def test_environment__no_checkout_or_no_git__has_no_commit(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        assert "commit" not in environment()
    # As in site-packages inside somebody else's checkout.
    monkeypatch.setattr(mil_anchor.environment, "_ROOT", ROOT / "src")
    assert "commit" not in environment()


def test_environment__variables__are_not_told(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-key")
    monkeypatch.setenv("USER", "a-user-name")

    told = json.dumps(environment())

    assert not re.search("a-secret-key|a-user-name", told)


def test_write_environment__folder__has_it_as_json(tmp_path):
    write_environment(tmp_path)

    assert json.loads((tmp_path / "environment.json").read_text()) == environment()


def test_read_environment__written_one__comes_back(tmp_path):
    write_environment(tmp_path)

    assert read_environment(tmp_path) == environment()


@pytest.mark.parametrize("content", [None, "[]", '{"processor": '])
def test_read_environment__none_that_can_be_read__is_empty(tmp_path, content):
    if content is not None:
        (tmp_path / "environment.json").write_text(content)

    assert read_environment(tmp_path) == {}
