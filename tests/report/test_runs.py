import json
from html import unescape

from mil_anchor.report.runs import runs_html
from mil_anchor.results import read_runs, read_unfinished
from tests.report.run_folders import write_run


def test_runs_html__complete_run__shows_metrics_configuration_and_environment(tmp_path):
    folder = write_run(tmp_path / "<i>", plugin="anchor", seed=3, weights="slow")

    html = runs_html(read_runs(tmp_path), [])

    assert 'data-data="synthetic" data-model="abmil" data-plugin="anchor"' in html
    assert "<b>abmil + anchor</b> on synthetic, seed 3, fold 0" in html
    assert "F1 0.800" in html
    assert "<dt>weights</dt><dd>slow</dd>" in html
    assert "<dt>torch</dt><dd>2.13.0</dd>" in html
    assert (folder / "config.yaml").read_text() in unescape(html)
    assert str(folder) in unescape(html)
    assert "<i>" not in html


def test_runs_html__older_run__says_that_it_kept_no_environment(tmp_path):
    write_run(tmp_path, keeps=())

    html = runs_html(read_runs(tmp_path), [])

    assert "<h4>Environment</h4><p" in html
    assert "Not kept by this run." in html


def test_runs_html__environment_that_cannot_be_read__is_not_kept(tmp_path):
    folder = write_run(tmp_path)
    (folder / "environment.json").write_text('{"torch": ')

    assert "Not kept by this run." in runs_html(read_runs(tmp_path), [])


def test_runs_html__failed_run__stands_first_with_its_error(tmp_path):
    write_run(tmp_path)
    failed = write_run(tmp_path, plugin="aem")
    (failed / "metrics.json").unlink()
    (failed / "error.txt").write_text("Traceback\n  File <string>\nValueError: lr < 0\n")

    html = runs_html(read_runs(tmp_path), read_unfinished(tmp_path))

    first, second = html.split("</details>")[:2]
    assert "unfinished" in first
    assert "ValueError: lr &lt; 0</span>" in first
    assert "File &lt;string&gt;" in first
    assert "complete" in second


def test_runs_html__folder_that_tells_no_names__has_question_marks(tmp_path):
    write_run(tmp_path)
    (tmp_path / "metrics.json").write_text("[]")

    html = runs_html(read_runs(tmp_path), read_unfinished(tmp_path))

    assert "<b>? + ?</b> on ?, seed ?, fold ?" in html


def test_runs_html__setting__is_part_of_the_name(tmp_path):
    for weight in (0.1, 0.2):
        folder = write_run(tmp_path / str(weight), plugin="anchor")
        config = json.loads((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(json.dumps({**config, "plugin": {"weight": weight}}))

    html = runs_html(read_runs(tmp_path), [])

    assert 'data-plugin="anchor (plugin.weight=0.1)"' in html
    assert "<b>abmil + anchor (plugin.weight=0.2)</b>" in html
