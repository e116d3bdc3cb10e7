"""Tests that the data doctor counts all rows, lists broken ones and reports correct findings."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from dataset import DataConfig, load_datasets
from model import ModelConfig
from tools import data_report, inspect_data
from trainlib.data import formats
from trainlib.data.epoch_plan import DataPosition

pytestmark = pytest.mark.usefixtures("elsewhere")

GOLDEN = Path(__file__).parents[1] / "golden"


def write(path, rows):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return path


def doctor(capsys, *arguments):
    code = inspect_data.main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)["files"]


def chat(question, answer):
    return {"conversations": [{"role": "user", "content": question},
                              {"role": "assistant", "content": answer}]}  # fmt: skip


@pytest.mark.parametrize("kind", ["pretrain", "sft", "dpo"])
def test_token_counts_match_training(kind, tmp_path, capsys, tokenizer):
    rows = {
        "pretrain": [{"text": f"row {i} 行"} for i in range(30)],
        "sft": [chat(f"q{i}", f"a{i} 答") for i in range(30)],
        "dpo": [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": "bad"} for i in range(30)],
    }[kind]
    path = write(tmp_path / "a.jsonl", rows)
    code, [report] = doctor(capsys, path)
    data = load_datasets(DataConfig(files=(str(path),)), kind, tokenizer, 64, 0)
    sets = [data.train, *data.val.values()]
    assert code == 0 and report["kind"] == kind and report["rows"] == 30 and not report["broken"]
    assert report["tokens"] == sum(packed.num_tokens for packed in sets)
    batches = [p.collate([row for row, _ in p.rows(DataPosition())], p.num_rows()) for p in sets]
    labels = sum(int((batch.labels >= 0).sum()) for batch in batches)
    assert report["supervised_tokens"] == labels


def test_every_broken_row_is_listed_and_the_exit_code_is_one(tmp_path, capsys):
    rows = [{"text": "a"}, "{\n", {"txt": 1}, {"text": ""}, "\n", {"text": "b"}] + ["x\n"] * 200
    code, [report] = doctor(capsys, write(tmp_path / "a.jsonl", rows))
    assert code == 1 and report["rows"] == 205
    assert [row["line"] for row in report["broken"]] == [2, 3, *range(7, 207)]
    assert all(set(row) == {"line", "reason"} and row["reason"] for row in report["broken"])


def test_every_row_is_broken_if_the_format_is_wrong_or_unknown(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    code, [report] = doctor(capsys, path, "--stage", "sft")
    assert code == 1 and len(report["broken"]) == report["rows"] == 2
    code, [report] = doctor(capsys, write(tmp_path / "b.jsonl", [{"zzz": 1}, {"zzz": 2}]))
    assert code == 1 and len(report["broken"]) == 2 and report["kind"] is None
    assert report["broken"][0]["reason"] == "unknown row format (keys: zzz)"
    assert "tools.inspect_data --help" in (data_report.terminal_text([report], False))
    code, [report] = doctor(capsys, write(tmp_path / "c.jsonl", []))
    assert code == 1 and "empty" in report["broken"][0]["reason"]
    code, [report] = doctor(capsys, tmp_path / "absent.jsonl")
    assert code == 1 and report["rows"] == 0
    assert report["broken"][0]["reason"].endswith("absent.jsonl does not exist")


def test_hours_are_based_on_the_newest_run_of_the_stage(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}])
    assert doctor(capsys, path)[1][0]["tokens_per_second"] is None
    runs = {"pretrain_old": ("pretrain", 10.0), "mine": ("pretrain", 20.0),
            "not_pretrain": ("sft", 30.0), "says_no_stage": (None, 40.0),
            "another_size": ("pretrain", 50.0)}  # fmt: skip
    for age, (name, (stage, speed)) in enumerate(runs.items()):
        folder = tmp_path / "runs" / name
        (folder / "final").mkdir(parents=True)
        model = ModelConfig(hidden_size=128) if name == "another_size" else ModelConfig()
        write(folder / "final/config.json", [asdict(model)])
        (folder / "identity.json").write_text(json.dumps({"stage": stage} if stage else {}))
        write(folder / "metrics.jsonl", [{"step": 1, "train/tokens_per_second": speed}, '{"step'])
        os.utime(folder / "metrics.jsonl", (age, age))
    [report] = doctor(capsys, path)[1]
    assert (report["tokens_per_second"], report["speed_of"]) == (20.0, "runs/mine")
    assert "20 tokens per second (measured in runs/mine)" in data_report.terminal_text(
        [report], False
    )


def test_the_help_lists_all_formats(capsys):
    with pytest.raises(SystemExit):
        inspect_data.main(["--help"])
    assert formats.known_formats() in capsys.readouterr().out


def test_findings_list_the_right_rows(tmp_path, capsys):
    long = "the quick brown fox jumps over the lazy dog and runs far away from here " * 9
    rows = [
        chat("q", "a <|im_end|> b"), chat("q", ""), chat("same", "same words"),
        chat("same", "same words"), chat("x", long), chat("x", long + "!"), chat("z " * 999, "a"),
        chat("天地玄黄宇宙洪荒", "日月盈昃辰宿列张"),
    ]  # fmt: skip
    code, [report] = doctor(capsys, write(tmp_path / "a.jsonl", rows), "--sequence-length", 256)
    assert code == 0  # Only broken rows change the exit code.
    assert report["special_text"] == {"count": 1, "lines": [1]}
    assert report["empty"]["lines"] == [2] and report["exact_duplicates"]["lines"] == [4]
    assert report["near_duplicates"]["lines"] == [6]
    assert report["no_supervised"]["lines"] == [7] and report["truncated_rows"] == 1 / 7
    assert report["languages"]["Chinese"] == 1 and report["scripts"]["Han"] > 0
    assert sum(bar["rows"] for bar in report["length_histogram"]) == 7
    assert report["packing_gain"] > 1.5 and report["padding_packed"] < report["padding_unpacked"]


def test_a_fix_is_suggested_if_truncation_loses_tokens(tmp_path, capsys):
    long = "word " * 300
    cases = {
        "fits": ([chat(f"q{i}", f"a{i}") for i in range(3)], False),
        "no answer": ([chat(f"q{i}", f"a{i}") for i in range(99)] + [chat(long, "a")], True),
        "most": ([chat("q", long)], True), "document": ([{"text": long}], False),
    }  # fmt: skip
    for name, (rows, lost) in cases.items():
        path = write(tmp_path / f"{name}.jsonl", rows)
        code, [report] = doctor(capsys, path, "--sequence-length", 64)
        text = data_report.terminal_text([report], False)
        assert code == 0 and ("nothing to fix" in text) is not lost, name
        assert ("lost to truncation" in text and "sequence_length=" in text) is lost, name
    assert "data.too_long=drop" in data_report.html_page(
        doctor(capsys, tmp_path / "most.jsonl", "--sequence-length", 64)[1]
    )


def test_preference_findings_list_the_right_rows(tmp_path, capsys):
    def pair(chosen, rejected, **more):
        return {"prompt": "q", "chosen": chosen, "rejected": rejected, **more}

    rows = [pair("long answer", "short"), pair("same", "same"), pair("a longer one", "b"),
            pair("<think>\n\n</think>\n\nyes", "yes.")]  # fmt: skip
    code, [report] = doctor(capsys, write(tmp_path / "a.jsonl", rows))
    assert code == 0 and report["equal_pairs"]["lines"] == [2]
    assert any("the same answer" in finding["name"] for finding in report["findings"])
    assert report["template_pairs"]["lines"] == [4]
    assert report["trivial_rules"]["longer"] == pytest.approx(2 / 3)


def test_sampling_reads_all_rows_and_estimates_tokens(tmp_path, capsys):
    rows = [{"text": f"row {i} of many rows"} for i in range(1500)] + ["{\n"]
    path = write(tmp_path / "a.jsonl", rows)
    _, [full] = doctor(capsys, path)
    code, [sampled] = doctor(capsys, path, "--sample", "12KB")
    assert code == 1 and sampled["sampled"] and sampled["rows"] == full["rows"] == 1501
    assert sampled["broken"] == full["broken"] and 100 < sampled["rows_looked_at"] < 900
    assert sampled["tokens"] == pytest.approx(full["tokens"], rel=0.05)


def test_terminal_and_html_reports_show_rows_and_reasons(tmp_path, capsys):
    page = tmp_path / "page.html"
    files = [GOLDEN / "minimind.jsonl", GOLDEN / "wyf3_dpo.json",
             write(tmp_path / "other.jsonl", [{"x": 1}])]  # fmt: skip
    assert inspect_data.main([*map(str, files), "--html", str(page)]) == 1
    out = capsys.readouterr().out
    assert "conversations" in out and "broken: line 1: unknown row" in out and "█" in out
    assert "<span class=on>" in page.read_text(encoding="utf-8")


def test_an_html_report_only_replaces_html_reports(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}])
    page = tmp_path / "page.html"
    assert inspect_data.main([str(path), "--html", str(page)]) == 0
    assert inspect_data.main([str(path), "--html", str(page)]) == 0
    capsys.readouterr()
    monkeypatch.setattr(inspect_data, "inspect", lambda *_: pytest.fail("inspected a file"))
    for target, error in ((path, "exists"), (tmp_path / "no" / "a.html", "no folder"),
                          (tmp_path, "is a folder")):  # fmt: skip
        assert inspect_data.main([str(path), "--html", str(target)]) == 1
        assert error in capsys.readouterr().err
    assert path.read_text() == '{"text": "a"}\n'


def test_browsers_and_terminals_never_execute_text_in_the_data(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"text": "<script>alert(1)</script>\x1b[2J"}, "<b>\n"])
    page = tmp_path / "page.html"
    inspect_data.main([str(path), "--html", str(page)])
    assert "<script>" not in page.read_text(encoding="utf-8")
    report = doctor(capsys, path)[1][0] if capsys.readouterr() else {}
    assert "\x1b[2J" not in data_report.terminal_text([report], True)


def test_rows_with_several_documents_are_counted_once(tmp_path, capsys):
    rows = [{"text": f"<s>row {i}</s><s>of many</s><s>rows {i}</s>"} for i in range(2000)]
    path = write(tmp_path / "a.jsonl", rows)
    [full] = doctor(capsys, path, "--rows", 2)[1]
    [sampled] = doctor(capsys, path, "--sample", "40KB")[1]
    assert (
        full["rows_looked_at"] == 2000
        and [e["line"] for e in full["examples"]] == [1] * 3 + [2] * 3
    )
    assert sampled["rows_looked_at"] < 1500
    assert sampled["tokens"] == pytest.approx(full["tokens"], rel=0.05)


def test_unpaired_preferences_are_reported_as_fine_tuning_reads_them(tmp_path, capsys):
    rows = [{"prompt": f"q{i}", "completion": f"a{i}", "label": i % 2 == 0} for i in range(10)]
    path = write(tmp_path / "kto.jsonl", rows)
    code, [report] = doctor(capsys, path)
    assert (code, report["format"], report["kind"]) == (0, "unpaired", "sft")
    assert report["rows"] == 10 and report["rows_looked_at"] == 10 and len(report["examples"]) == 3
    [finding] = [f for f in report["findings"] if "label" in f["name"]]
    assert finding["count"] == 5 and finding["share"] == 0.5
    code, [report] = doctor(capsys, path, "--stage", "dpo")
    assert code == 1 and len(report["broken"]) == 10


def test_the_report_counts_the_rows_that_markers_split(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"text": "<s>one</s><s>two</s>"}, {"text": "three"}])
    [report] = doctor(capsys, path)[1]
    assert (report["split_rows"], report["documents"]) == (1, 2)
    assert "rows split at markers: 1 into 2 documents" in data_report.terminal_text([report], False)
