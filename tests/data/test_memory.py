import pickle
from types import SimpleNamespace

import psutil
import pytest

from mil_anchor.data.memory import MemoryBudget, available_memory


def _group(folder, *, limit, use, cached, version=2):
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        2: ("memory.max", "memory.current", "inactive_file"),
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }[version]
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{use}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")


@pytest.fixture
def free(monkeypatch):
    """The machine has 1000 bytes left."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))


def test_available_memory__no_groups__is_what_the_machine_has(tmp_path, free):
    assert available_memory(tmp_path, tmp_path / "absent") == 1000


@pytest.mark.parametrize(
    ("version", "line", "root"), [(2, "0::/job/step", ""), (1, "4:memory:/job/step", "memory")]
)
def test_available_memory__group_around_the_own_one_is_tighter__is_its_room(
    version, line, root, tmp_path, free
):
    (tmp_path / "cgroup").write_text(f"7:cpu:/job\n{line}\n")
    _group(tmp_path / root / "job", limit=600, use=500, cached=30, version=version)
    _group(tmp_path / root / "job/step", limit=900, use=100, cached=0, version=version)
    assert available_memory(tmp_path, tmp_path / "cgroup") == 130


def test_available_memory__path_of_the_host__looks_at_the_visible_root(tmp_path, free):
    (tmp_path / "cgroup").write_text("0::/docker/0815\n")
    _group(tmp_path, limit=600, use=500, cached=0)
    assert available_memory(tmp_path, tmp_path / "cgroup") == 100


def test_available_memory__group_without_limit__is_what_the_machine_has(tmp_path, free):
    (tmp_path / "cgroup").write_text("0::/\n")
    _group(tmp_path, limit="max", use=500, cached=0)
    assert available_memory(tmp_path, tmp_path / "cgroup") == 1000


def test_available_memory__group_over_its_limit__is_none(tmp_path, free):
    (tmp_path / "cgroup").write_text("0::/\n")
    _group(tmp_path, limit=500, use=600, cached=0)
    assert available_memory(tmp_path, tmp_path / "cgroup") == 0


def test_available_memory__this_machine__is_some_and_not_more_than_it_has():
    assert 0 < available_memory() <= psutil.virtual_memory().total


def test_memory_budget__auto__is_half_of_what_is_left_shared_by_the_processes():
    one = MemoryBudget().limit
    assert 0.4 * available_memory() < one < 0.6 * available_memory()
    assert MemoryBudget(n_processes=4).limit == pytest.approx(one / 4, rel=0.2)


@pytest.mark.parametrize(
    ("setting", "limit"), [(True, float("inf")), (False, 0), (2, 2e9), (0.5, 5e8), (0, 0)]
)
def test_memory_budget__setting__is_a_limit_per_process(setting, limit):
    assert MemoryBudget(keep_in_memory=setting, n_processes=2).limit == limit


@pytest.mark.parametrize("setting", [-1, float("nan"), float("inf"), "all"])
def test_memory_budget__other_setting__is_refused(setting):
    with pytest.raises(ValueError, match=rf"number of GB from 0, but {setting!r} came"):
        MemoryBudget(keep_in_memory=setting)


def test_memory_budget__no_process__is_refused():
    with pytest.raises(ValueError, match="n_processes must be at least 1, but 0 came"):
        MemoryBudget(n_processes=0)


def test_memory_budget__taking__never_exceeds_the_limit():
    budget = MemoryBudget(keep_in_memory=100e-9)
    assert budget.take(60)
    assert not budget.take(41)
    assert budget.has_room
    assert budget.take(40)
    assert not budget.has_room
    assert budget.used == 100


def test_memory_budget__pickled__is_empty_and_as_large():
    budget = MemoryBudget(keep_in_memory=1)
    budget.take(60)
    copy = pickle.loads(pickle.dumps(budget))
    assert (copy.used, copy.limit) == (0, 1e9)
