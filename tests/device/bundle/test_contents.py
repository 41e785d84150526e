"""Packing a run, and refusing every bundle that is not what was packed."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import subprocess
import tarfile

import numpy as np
import pytest

from ampdeploy import artifacts
from ampdeploy.artifacts import Manifest, sha256_file
from ampdeploy.cli import main
from ampdeploy.device.bundle import archive
from ampdeploy.device.bundle import contents as form
from ampdeploy.device.platform import device_facts
from ampdeploy.device.radar.bugs import graph_patterns
from ampdeploy.errors import AmpDeployError, ArtifactError
from ampdeploy.export.write import write_graph
from ampdeploy.pipeline import rerun_config
from ampdeploy.precision.graph import load_model
from ampdeploy.targets.base import get_target
from tests.device.bundles import reseal
from tests.device.engine_samples import ADA, ORIN
from tests.targets.test_tensorrt import write_engine

FILES = (
    "README.md", "bank.npz", "baseline.fp16.onnx", "goldens.npz", "model.fp16.onnx",
    "precision.json", "report.json",
)  # fmt: skip


def refusal(folder, here=None) -> str:
    """Why the bundle in `folder` is refused."""
    with pytest.raises(ArtifactError) as caught:
        form.check_files(form.read_bundle(folder), here or device_facts())
    return str(caught.value)


def test_a_bundle_holds_what_a_device_needs(packed, deferred_run):
    bundle = form.read_bundle(packed)
    form.check_files(bundle, device_facts())
    manifest, config = bundle.manifest, rerun_config(deferred_run)
    assert sorted(manifest.files) == sorted(FILES)
    assert (manifest.target, manifest.precision, manifest.image_size) == ("trt", "fp16", 160)
    assert manifest.engine == config.engine
    assert manifest.min_cosine_p1 == config.precision.min_cosine_p1
    assert set(manifest.patterns) == graph_patterns(packed / "model.fp16.onnx")
    assert {"transformer", "dynamic-batch", "fp16-attention"} <= set(manifest.patterns)
    for name in ("model.fp16.onnx", "baseline.fp16.onnx", "precision.json", "report.json"):
        assert sha256_file(packed / name) == sha256_file(deferred_run / name)
    verdict = artifacts.read_json(deferred_run / artifacts.PRECISION)
    assert manifest.verdict["pruned"]["outputs"] == verdict["pruned"]["judgement"]["outputs"]
    done = subprocess.run(["sha256sum", "--check", form.CHECKSUM], cwd=packed, capture_output=True)
    assert done.returncode == 0


def test_goldens_are_judged_images_and_what_the_float32_models_make_of_them(packed, deferred_run):
    goldens = form.read_bundle(packed).arrays(form.GOLDENS)
    assert goldens["images"].shape == (16, 3, 160, 160)
    assert goldens["images"].dtype == np.float32
    assert goldens["images"].std() > 0.3
    with get_target("ort").open(deferred_run / artifacts.MODEL_ONNX) as runner:
        found = runner.run(goldens["images"])
    for name, values in found.items():
        np.testing.assert_allclose(goldens[name], values, rtol=1e-4, atol=1e-4)
    with get_target("ort").open(deferred_run / artifacts.BASELINE_ONNX) as runner:
        dense = runner.run(goldens["images"])["features"]
    np.testing.assert_allclose(goldens["baseline_features"], dense, rtol=1e-4, atol=1e-4)
    assert np.abs(dense - found["features"]).max() > 1e-2


def test_the_bank_has_labels_and_no_golden_image(packed, deferred_run):
    bundle = form.read_bundle(packed)
    bank = bundle.arrays(form.BANK)
    facts = Manifest.read(deferred_run).facts("data")
    labels = [label for _, _, label in facts["bank"]["files"]]
    assert bundle.manifest.bank_images == len(labels) == 40
    assert [bank["classes"][i] for i in bank["labels"]] == labels
    golden = [label for _, _, label in facts["queries"]["files"]][:16]
    assert [bank["classes"][i] for i in bank["golden_labels"]] == golden
    assert bank["pruned"].shape == bank["baseline"].shape == (40, 64)
    hashes = {
        kind: {digest for _, digest, _ in facts[kind]["files"]} for kind in ("bank", "queries")
    }
    assert not hashes["bank"] & hashes["queries"]


def test_instructions_name_the_command_and_the_files(packed):
    text = (packed / form.README).read_text()
    assert "dynamic-batch-transformer may be met" in text  # on JetPack 6.1, for one
    assert "engine tiny-bundle --target ort\n" in text  # the way without TensorRT
    assert "ampdeploy engine tiny-bundle --target trt" in text
    assert "--system-site-packages" in text
    assert all(
        f"`{name}`" in text for name in ("model.fp16.onnx", "baseline.fp16.onnx", "bank.npz")
    )
    assert "{{" not in text
    assert "{%" not in text


def test_packing_twice_gives_the_same_bytes(packed_tar, deferred_run, tmp_path):
    again = tmp_path / "tiny.tar"
    assert main(["bundle", str(deferred_run), "--out", str(again), "-q"]) == 0
    assert again.read_bytes() == packed_tar.read_bytes()
    assert os.listdir(tmp_path) == ["tiny.tar"]


def test_json_says_what_to_compare_over_a_channel_that_is_not_trusted(
    deferred_run, tmp_path, capsys
):
    out = tmp_path / "b"
    assert main(["bundle", str(deferred_run), "--out", str(out), "--json", "-q"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["sha256"] == sha256_file(out / form.BUNDLE_JSON)
    assert said["manifest"]["files"]["model.fp16.onnx"]["bytes"] > 0


def test_a_bundle_replaces_a_bundle_and_nothing_else(deferred_run, packed, tmp_path, capsys):
    old = tmp_path / "old"
    shutil.copytree(packed, old)
    (old / "model.fp16.onnx").write_bytes(b"of an earlier run")
    assert main(["bundle", str(deferred_run), "--out", str(old), "-q"]) == 0
    form.check_files(form.read_bundle(old), device_facts())
    mine, tar = tmp_path / "mine", tmp_path / "mine.tar"
    mine.mkdir()
    (mine / "thesis.txt").write_text("draft")
    tar.write_text("not a bundle")
    for out in (mine, tar, deferred_run):
        assert main(["bundle", str(deferred_run), "--out", str(out), "-q"]) == 1
        assert "nothing there was touched" in capsys.readouterr().err
    assert (mine / "thesis.txt").read_text() == "draft"
    assert tar.read_text() == "not a bundle"
    assert sorted(os.listdir(tmp_path)) == ["mine", "mine.tar", "old"]


def test_leftovers_of_a_killed_packing_go(deferred_run, tmp_path):
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    stale = tmp_path / f".b.{dead.pid}.packing"
    stale.mkdir()
    (stale / "goldens.npz").write_bytes(b"half")
    assert main(["bundle", str(deferred_run), "--out", str(tmp_path / "b"), "-q"]) == 0
    assert os.listdir(tmp_path) == ["b"]


def test_a_run_whose_graph_was_changed_is_not_packed(deferred_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(deferred_run, run)
    (run / "model.fp16.onnx").write_bytes((run / "baseline.fp16.onnx").read_bytes())
    assert main(["bundle", str(run), "-q"]) == 1
    assert "Run `ampdeploy report" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["run"]


def test_weights_in_a_file_of_their_own_are_packed(deferred_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(deferred_run, run)
    manifest = json.loads((run / "manifest.json").read_text())
    stage = next(s for s in manifest["stages"].values() if "model.fp16.onnx" in s["outputs"])
    for name in ("model.fp16.onnx", "baseline.fp16.onnx"):
        write_graph(load_model(run / name), run / name, single_file_limit=0)
        for file in (name, f"{name}.data"):
            stage["outputs"][file] = sha256_file(run / file)
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert main(["bundle", str(run), "-q"]) == 0
    bundle = form.read_bundle(tmp_path / "run-bundle")
    form.check_files(bundle, device_facts())
    data = {f"{name}.data" for name in ("model.fp16.onnx", "baseline.fp16.onnx")}
    # The report is of the graphs as they were, so it does not come along.
    assert set(bundle.manifest.files) == {*FILES, *data} - {"report.json"}


def test_what_no_device_runs_is_not_packed(deferred_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(deferred_run, run)
    manifest = json.loads((run / "manifest.json").read_text())
    config = manifest["config"]
    config["target"] = "torch"
    config["precision"]["precision"], config["engine"]["when"] = "fp32", "now"
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert main(["bundle", str(run), "-q"]) == 2
    assert "which devices do not run" in capsys.readouterr().err


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_is_found(bundle, name):
    path = bundle / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert f"{name}: changed, another sha256" in refusal(bundle)


@pytest.mark.parametrize("name", form.HEAD)
def test_one_changed_byte_of_the_head_is_found(bundle, name):
    path = bundle / name
    good = path.read_bytes()
    for position in range(0, len(good), max(1, len(good) // 40)):
        data = bytearray(good)
        data[position] ^= 1
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=r"bundle\.json has sha256 .* does not say so"):
            form.read_bundle(bundle)


def test_every_problem_is_named_at_once(bundle):
    os.truncate(bundle / "model.fp16.onnx", 1000)
    with open(bundle / "goldens.npz", "ab") as handle:
        handle.write(b"more")
    (bundle / "bank.npz").unlink()
    (bundle / "precision.json").rename(bundle / "prec.json")
    (bundle / "report.json").unlink()
    (bundle / "report.json").symlink_to("/etc/hostname")
    said = refusal(bundle)
    for problem in (
        "model.fp16.onnx: cut short, 1000 bytes of",
        "goldens.npz:",
        "bank.npz: missing",
        "prec.json: not part of the bundle",
        "precision.json: missing",
        "report.json: not a plain file",
    ):
        assert f"- {problem}" in said


@pytest.mark.parametrize("name", form.HEAD)
def test_a_missing_head_is_named(bundle, name, capsys):
    (bundle / name).unlink()
    assert main(["engine", str(bundle), "--target", "ort", "-q"]) == 1
    assert f"{name} is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"schema_version": 2}, "has schema version 2; this ampdeploy"),
        ({"precision": "int4"}, "has precision 'int4'"),
        ({"min_cosine_p1": 0}, "has a bar of 0"),
        ({"onnx": "other.onnx"}, "does not list 'other.onnx'"),
        (
            {"files": {"../../etc/cron.d/x": {"bytes": 1, "sha256": "0" * 64}}},
            "which no bundle has",
        ),
        ({"files": {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}}, "which no bundle has"),
        ({"files": {"a.onnx": {"bytes": -1, "sha256": "0" * 64}}}, "nothing sensible"),
        ({"engine": {}}, "has no 'batch'"),
        ({"more": 1}, "unknown keys 'more'"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(bundle, changes, problem):
    data = json.loads((bundle / form.BUNDLE_JSON).read_text())
    (bundle / form.BUNDLE_JSON).write_text(json.dumps({**data, **changes}))
    digest = sha256_file(bundle / form.BUNDLE_JSON)
    (bundle / form.CHECKSUM).write_text(form.checksum_text(digest))
    with pytest.raises(ArtifactError, match=problem.replace(".", r"\.")):
        form.read_bundle(bundle)


def test_options_that_do_not_exist_are_refused_as_damage(bundle):
    data = json.loads((bundle / form.BUNDLE_JSON).read_text())
    data["engine"]["portable"] = "everywhere"
    (bundle / form.BUNDLE_JSON).write_text(json.dumps(data))
    digest = sha256_file(bundle / form.BUNDLE_JSON)
    (bundle / form.CHECKSUM).write_text(form.checksum_text(digest))
    with pytest.raises(ArtifactError, match="everywhere"):
        form.read_bundle(bundle)


def test_an_engine_of_another_machine_in_a_bundle_is_refused_with_the_mismatch(bundle):
    for_orin = {
        "arch": "aarch64", "compute_capabilities": ("8.7",), "gpu": "Orin", "sm_count": 8,
    }  # fmt: skip
    write_engine(bundle, **for_orin)
    said = refusal(bundle, ADA)
    assert "it was built for aarch64" in said
    assert "built for compute capability 8.7, and this GPU" in said
    # Nor is one that fits taken over unseen.
    assert "engine.plan: not part of the bundle" in refusal(bundle, ORIN)


def altered(source, path, *, before=(), replace=None, mode="w", drop=()):
    """A copy of the archive `source` with `before` put behind its head, and members replaced."""
    with tarfile.open(source) as old, tarfile.open(path, mode) as new:
        for index, member in enumerate(old):
            name = member.name.removeprefix(archive.PREFIX)
            if name in drop:
                continue
            if index == len(form.HEAD):
                for extra, content in before:
                    new.addfile(extra, io.BytesIO(content))
            content = old.extractfile(member).read()
            if replace and name in replace:
                content = replace[name]
                member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    return path


def evil(name, content=b"evil", **facts):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in facts.items():
        setattr(member, key, value)
    return member, content


PLACES = archive.PREFIX


@pytest.mark.parametrize(
    ("member", "problem"),
    [
        (evil("../evil"), "would lie outside"),
        (evil("/tmp/evil"), "would lie outside"),
        (evil(f"{PLACES}../evil"), "would lie outside"),
        (evil(f"{PLACES}deep/evil"), "would lie outside"),
        (evil(f"{PLACES}.."), "would lie outside"),
        (evil(f"{PLACES}..\\evil"), "would lie outside"),
        (evil("evil"), "would lie outside"),
        (evil(f"{PLACES}evil"), "unlisted"),
        (evil(f"{PLACES}bundle.json"), "twice"),
        (evil(f"{PLACES}goldens.npz"), "bytes, and bundle.json states"),
        (evil(f"{PLACES}bank.npz", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is a link"),
        (evil(f"{PLACES}bank.npz", b"", type=tarfile.LNKTYPE, linkname="../../x"), "is a link"),
        (evil(f"{PLACES}bank.npz", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=3), "device"),
        (evil(f"{PLACES}bank.npz", b"", type=tarfile.FIFOTYPE), "device"),
        (evil(f"{PLACES}bank.npz", b"", type=tarfile.DIRTYPE), "folder"),
        (
            evil(f"{PLACES}bank.npz", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0",
                 "GNU.sparse.name": f"{PLACES}bank.npz", "GNU.sparse.realsize": "99999999999"},
                 content=b"1\n0\n99999999999\n".ljust(512, b"\0")),
            "sparse",
        ),
    ],
)  # fmt: skip
def test_archives_that_would_do_harm_are_refused(packed_tar, tmp_path, member, problem):
    bad = altered(packed_tar, tmp_path / "bad.tar", before=[member])
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    with pytest.raises(ArtifactError, match=problem):
        archive.extract(bad, inner / "out")
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert written <= {"bad.tar", *form.HEAD}


def test_a_file_twice_is_refused(packed_tar, tmp_path):
    with tarfile.open(packed_tar) as good:
        member = good.getmember(f"{PLACES}bank.npz")
        content = good.extractfile(member).read()
    bad = altered(packed_tar, tmp_path / "bad.tar", before=[(member, content)])
    with pytest.raises(ArtifactError, match=r"bank\.npz' twice"):
        archive.extract(bad, tmp_path / "out")


def test_a_file_that_grew_is_not_written(packed_tar, tmp_path):
    bad = altered(packed_tar, tmp_path / "bad.tar", replace={"bank.npz": b"0" * 1_000_000})
    with pytest.raises(ArtifactError, match=r"with 1000000 bytes, and bundle\.json states"):
        archive.extract(bad, tmp_path / "out")
    assert not (tmp_path / "out" / "bank.npz").exists()


def test_a_head_without_end_is_not_read(packed_tar, tmp_path):
    bad = altered(packed_tar, tmp_path / "bad.tar", replace={"bundle.json": b" " * 2_000_000})
    with pytest.raises(ArtifactError, match="2000000 bytes, more than any"):
        archive.read_head(bad)


def test_a_removed_file_is_named(packed_tar, tmp_path):
    bad = altered(packed_tar, tmp_path / "bad.tar", drop={"model.fp16.onnx"})
    with pytest.raises(ArtifactError, match=r"lacks model\.fp16\.onnx"):
        archive.extract(bad, tmp_path / "out")


@pytest.mark.parametrize("share", [0, 0.0001, 0.5, 0.95])
def test_a_truncated_archive_is_refused(packed_tar, tmp_path, share):
    bad = tmp_path / "bad.tar"
    shutil.copy(packed_tar, bad)
    os.truncate(bad, int(packed_tar.stat().st_size * share))
    with pytest.raises(ArtifactError, match=r"cut short|damaged|no bundle"):
        archive.extract(bad, tmp_path / "out")
    assert os.listdir(tmp_path) == ["bad.tar"]


def test_where_an_archive_ends_early_it_is_to_be_copied_again(packed_tar, tmp_path):
    bad = tmp_path / "bad.tar"
    shutil.copy(packed_tar, bad)
    with tarfile.open(packed_tar) as good:
        last = good.getmembers()[-1]
    os.truncate(bad, last.offset_data + last.size // 2)
    with pytest.raises(ArtifactError, match=r"damaged: .*\. Copy it again"):
        archive.extract(bad, tmp_path / "out")


def test_a_compressed_archive_is_not_opened(packed_tar, tmp_path):
    bad = altered(packed_tar, tmp_path / "bad.tar", mode="w:gz")
    with pytest.raises(ArtifactError, match="no tar of a bundle"):
        archive.extract(bad, tmp_path / "out")


def test_another_archive_is_no_bundle(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with tarfile.open(tmp_path / "other.tar", "w") as other:
        other.add(tmp_path / "notes.txt", f"{PLACES}notes.txt")
    with pytest.raises(ArtifactError, match=r"where a bundle has bundle\.json"):
        archive.read_head(tmp_path / "other.tar")


def test_a_bundle_larger_than_the_disk_is_not_unpacked(bundle, tmp_path, capsys):
    """Stated by a sparse file, so that the test needs no disk either."""
    with open(bundle / "model.onnx.data", "wb") as handle:
        handle.truncate(1 << 20)
    sealed = reseal(bundle)
    files = {name: dataclasses.asdict(facts) for name, facts in sealed.manifest.files.items()}
    files["model.onnx.data"]["bytes"] = 1 << 60
    data = json.loads((bundle / form.BUNDLE_JSON).read_text())
    (bundle / form.BUNDLE_JSON).write_text(json.dumps({**data, "files": files}))
    digest = sha256_file(bundle / form.BUNDLE_JSON)
    (bundle / form.CHECKSUM).write_text(form.checksum_text(digest))
    archive.write_tar(bundle, tmp_path / "large.tar")
    with pytest.raises(AmpDeployError, match=r"MB left\. Free some space"):
        archive.extract(tmp_path / "large.tar", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_archive_unpacks_to_the_bundle(packed_tar, tmp_path):
    archive.extract(packed_tar, tmp_path / "out")
    form.check_files(form.read_bundle(tmp_path / "out"), device_facts())
    subprocess.run(["tar", "-xf", packed_tar], cwd=tmp_path, check=True)
    form.check_files(form.read_bundle(tmp_path / archive.PREFIX), device_facts())
