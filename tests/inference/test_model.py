"""A trained model in a folder and in one file: the same predictions, nothing private, and no trust in strangers."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import stat
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tiny_plans import make_network, make_normalization, make_tiny_configuration, make_tiny_plan

import autoseg
from autoseg.core.errors import AutosegError, FormatError, PredictionError, TrainingError
from autoseg.core.labels import LabelSpec
from autoseg.core.serialize import write_json
from autoseg.inference.archive import FORMAT_VERSION
from autoseg.inference.model import export_model, read_model
from autoseg.inference.predictor import Predictor
from autoseg.planning.plan import PLAN_VERSION, Plan
from autoseg.training.checkpoint import RunState, save_checkpoint, save_weights
from autoseg.training.folds import trained_folds, unfinished_folds, usable_folds
from autoseg.training.record import FoldFiles, TrainingRecord

SPACING_MM = (2.0, 1.0, 1.0)
CASES = ("patient_anna", "patient_bert", "patient_cora")
RECORD = TrainingRecord(
    autoseg="0.1",
    torch="2",
    device="cpu",
    precision="float32",
    recipe="fast",
    seed=11,
    batch_size=2,
    mirrored=True,
    training_cases=CASES[:2],
    validation_cases=CASES[2:],
)
STATE = RunState(
    config="abc",
    iteration=37,
    epoch=4,
    elapsed_s=1.5,
    before_s=0.5,
    epoch_losses=(),
    epoch_time_s=0.0,
    loss_scale=None,
    device="cpu",
    precision="float32",
    finished=False,
)


def make_plan(*, provenance: dict[str, str] | None = None) -> Plan:
    configuration = make_tiny_configuration(
        (8, 12, 12), spacing_mm=SPACING_MM, median_shape=(10, 12, 14), largest_shape=(11, 16, 16)
    )
    # Numbers that JSON has to bring back exactly.
    scheme = replace(make_normalization(), mean=0.1 + 0.2, percentile_99_5=np.nan)
    return replace(
        make_tiny_plan(configuration, labels=LabelSpec(names=("vessel", "organ"), values=(3, 117))),
        dataset="Gefäße",
        normalization=(scheme,),
        provenance=provenance or {"autoseg": "0.1", "fingerprint": "0123456789abcdef"},
    )


def make_model(
    folder: Path, *, finished: tuple[int, ...] = (0, 2), unfinished: tuple[int, ...] = (), plan: Plan | None = None
) -> Path:
    """A model whose every fold has other random weights."""
    plan = plan or make_plan()
    write_json(folder / "plan.json", plan)
    for fold in (*finished, *unfinished):
        files = FoldFiles(folder=folder / f"fold_{fold}")
        write_json(files.training, RECORD)
        network = make_network(plan, seed=fold)
        # A step that changes nothing, so that the checkpoint has moments besides the weights.
        optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9)
        network(torch.ones(1, 1, 8, 12, 12))[0].sum().backward()
        optimizer.step()
        save_checkpoint(files.checkpoint, network, optimizer, STATE)
        if fold in finished:
            save_weights(files.weights, network)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folds 0 and 2. Do not change it."""
    return make_model(tmp_path_factory.mktemp("models") / "3d_fullres")


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    """The same in one file. Do not change it."""
    return export(folder)


def export(folder: Path, target: Path | None = None, *, folds: tuple[int, ...] | None = None) -> Path:
    target = target or folder.with_suffix(".autoseg")
    export_model(read_model(folder), target, folds=folds)
    return target


def segment(model: Path, **options: Any) -> NDArray:
    image = np.random.default_rng(0).normal(size=(9, 16, 13)).astype(np.float32)
    label: NDArray = Predictor(model, device="cpu", **options).predict(image, spacing_mm=SPACING_MM)
    assert set(np.unique(label)) == {0, 3, 117}
    return label


# -- one file ----------------------------------------------------------------------------------------------------------


def test_a_file_predicts_what_its_folder_predicts(folder: Path, file: Path) -> None:
    np.testing.assert_array_equal(segment(file), segment(folder))
    np.testing.assert_array_equal(segment(file, folds=[2]), segment(folder, folds=[2]))
    assert (segment(file) != segment(file, folds=[2])).any()
    assert Predictor(file, device="cpu").mirroring


def test_a_file_holds_the_plan_and_how_each_fold_was_trained(folder: Path, file: Path) -> None:
    first, second = read_model(folder), read_model(file)
    assert (first.finished, first.unfinished) == (second.finished, second.unfinished) == ((0, 2), ())
    assert first.configuration == second.configuration
    assert second.plan.dataset == "Gefäße"
    assert first.source.read_record(2) == second.source.read_record(2)
    assert second.source.read_record(2).seed == 11
    with zipfile.ZipFile(file) as opened:
        names = opened.namelist()
        manifest = json.loads(opened.read("manifest.json"))
    members = [f"fold_{fold}/{name}" for fold in (0, 2) for name in ("training.json", "weights.safetensors")]
    assert names == ["plan.json", *members, "manifest.json"]
    assert manifest["folds"] == {"0": None, "2": None}


def test_equal_models_give_equal_bytes(folder: Path, file: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere", copy_function=shutil.copyfile))
    assert export(copy).read_bytes() == file.read_bytes()
    # A file can be exported again, and cut down to some folds.
    assert export(file, tmp_path / "again.autoseg").read_bytes() == file.read_bytes()
    one = export(file, tmp_path / "one.autoseg", folds=(2,))
    assert read_model(one).finished == (2,)
    assert one.read_bytes() == export(copy, tmp_path / "two.autoseg", folds=(2,)).read_bytes()


def test_the_digest_tells_models_apart_and_not_where_they_are(folder: Path, file: Path, tmp_path: Path) -> None:
    digest = read_model(folder).digest()
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert digest == read_model(file).digest() == Predictor(file, device="cpu").digest
    assert digest == Predictor(folder, device="cpu", folds=[2, 0]).digest
    assert digest != read_model(file).digest([0])
    changed = Path(shutil.copytree(folder, tmp_path / "changed"))
    save_weights(changed / "fold_2" / "weights.safetensors", make_network(make_plan(), seed=7))
    assert read_model(changed).digest([0]) == read_model(file).digest([0])
    assert read_model(changed).digest() != digest
    write_json(changed / "plan.json", replace(make_plan(), axis_order=(1, 0, 2)))
    assert read_model(changed).digest([0]) != read_model(file).digest([0])


def test_the_digest_is_what_sha256sum_makes_of_the_members(file: Path, tmp_path: Path) -> None:
    """As the documentation of `digest_model` says."""
    with zipfile.ZipFile(file) as opened:
        names = ("plan.json", "fold_0/weights.safetensors", "fold_2/weights.safetensors")
        listing = "".join(f"{hashlib.sha256(opened.read(name)).hexdigest()}  {name}\n" for name in names)
    assert hashlib.sha256(listing.encode()).hexdigest() == read_model(file).digest()


def test_no_case_and_no_path_leaves_the_machine(tmp_path: Path) -> None:
    provenance = {"autoseg": "0.1", "made_in": str(tmp_path), "cases": CASES[0]}
    folder = make_model(tmp_path / "3d_fullres", unfinished=(3,), plan=make_plan(provenance=provenance))
    content = export(folder, folds=(0, 2, 3)).read_bytes()
    for private in (str(tmp_path), tmp_path.name, str(Path.home()), *CASES, "training_cases", "validation_cases"):
        assert private.encode() not in content, private
    # They are there where they belong, or the search finds nothing whatever is written.
    assert str(tmp_path).encode() in (folder / "plan.json").read_bytes()
    assert CASES[0].encode() in (folder / "fold_0" / "training.json").read_bytes()


def test_an_export_that_fails_leaves_the_older_file(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "3d_fullres")
    target = export(folder)
    before = target.read_bytes()
    (folder / "fold_2" / "weights.safetensors").write_bytes(b"\x07" * 500)
    with pytest.raises(TrainingError, match=r"fold_2.weights\.safetensors: the file is damaged"):
        export(folder)
    assert target.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3d_fullres", "3d_fullres.autoseg"]


@pytest.mark.parametrize("name", ["model.zip", "model", "3d_fullres"])
def test_other_endings_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match=r"expected the name of a file that ends in \.autoseg"):
        export(folder, tmp_path / name)
    (tmp_path / "folder.autoseg").mkdir()
    with pytest.raises(FormatError, match="expected the name of a file"):
        export(folder, tmp_path / "folder.autoseg")


def test_a_fold_that_is_not_in_the_file(file: Path) -> None:
    with pytest.raises(PredictionError, match="found the trained folds 0, 2, expected also 1; the file was exported"):
        Predictor(file, device="cpu", folds=[0, 1])


def test_what_is_no_model_at_all(tmp_path: Path) -> None:
    with pytest.raises(PredictionError, match=r"nowhere: found no plan\.json, expected the folder .* or a \.autoseg"):
        read_model(tmp_path / "nowhere")


def test_a_work_folder_is_no_model(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "work")
    (tmp_path / "work" / "splits.json").write_text("{}")
    with pytest.raises(PredictionError, match=r"work: is a work folder, expected .*models/3d_fullres; .* with -w"):
        Predictor(tmp_path / "work", device="cpu")
    with pytest.raises(PredictionError, match="is a work folder, expected"):
        autoseg.predict(tmp_path, tmp_path / "out", model=tmp_path / "work", device="cpu")


def test_the_format_counts_up_with_what_it_holds() -> None:
    """Whoever changes the format of the plan changes that of the file: its readers are told to update."""
    assert (PLAN_VERSION, FORMAT_VERSION) == (2, 4), "count FORMAT_VERSION up too, and put both here"


# -- folds that are not trained to their end ---------------------------------------------------------------------------


def test_a_checkpoint_predicts_what_its_network_predicts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_model(tmp_path / "model", finished=(), unfinished=(1, 4))
    assert (trained_folds(folder), unfinished_folds(folder), usable_folds(folder)) == ((), (1, 4), (1, 4))
    # The same networks as if they were trained to their end.
    finished = make_model(tmp_path / "finished", finished=(1, 4))
    with caplog.at_level(logging.WARNING):
        maps = [segment(folder), segment(folder, folds=[4])]
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}: not trained to the end, so its last checkpoint is used: {which}"
        for which in ("fold 1 at step 37 (epoch 4), fold 4 at step 37 (epoch 4)", "fold 4 at step 37 (epoch 4)")
    ]
    np.testing.assert_array_equal(maps[0], segment(finished))
    np.testing.assert_array_equal(maps[1], segment(finished, folds=[4]))
    assert read_model(folder).digest() == read_model(finished).digest()


def test_finished_folds_go_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_model(tmp_path / "model", finished=(0,), unfinished=(1,))
    with caplog.at_level(logging.WARNING):
        assert Predictor(folder, device="cpu").folds == (0,)
        assert not caplog.records
        assert Predictor(folder, device="cpu", folds=[0, 1]).folds == (0, 1)
        assert len(caplog.records) == 1
    with pytest.raises(
        PredictionError, match="the trained folds 0 and the unfinished folds 1, expected also 2, 3; run"
    ):
        Predictor(folder, device="cpu", folds=[1, 3, 2])


def test_a_checkpoint_of_another_version_predicts_too(tmp_path: Path) -> None:
    """What the state of a run holds changes; the weights, and how far it had come, do not."""
    folder = make_model(tmp_path / "model", finished=(1,))
    expected = segment(folder)
    files = FoldFiles(folder=folder / "fold_1")
    files.weights.unlink()
    network = make_network(make_plan(), seed=1)
    weights = {f"network.{name}": tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, files.checkpoint, {"state": json.dumps({"iteration": 5, "epoch": 0, "unheard_of": [1]})})
    np.testing.assert_array_equal(segment(folder), expected)
    files.checkpoint.write_bytes(files.checkpoint.read_bytes()[:-100])
    with pytest.raises(TrainingError, match=r"checkpoint\.safetensors: the file is damaged"):
        Predictor(folder, device="cpu")


def test_unfinished_folds_are_exported_where_they_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_model(tmp_path / "model", finished=(0,), unfinished=(1,))
    assert read_model(export(folder)).unfinished == ()
    with caplog.at_level(logging.WARNING):
        target = export(folder, folds=(1, 0))
    assert "fold 1 at step 37 (epoch 4)" in caplog.text
    model = read_model(target)
    assert (model.finished, model.unfinished) == ((0,), (1,))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(segment(target, folds=[1]), segment(folder, folds=[1]))
    assert caplog.text.count("fold 1 at step 37 (epoch 4)") == 2
    assert Predictor(target, device="cpu").folds == (0,)


def test_nothing_is_exported_by_itself_where_no_fold_is_finished(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", finished=(), unfinished=(1, 3))
    with pytest.raises(PredictionError, match=r"no fold is trained to its end; name those .*: 1, 3"):
        export(folder)
    assert read_model(export(folder, folds=(3,))).unfinished == (3,)


# -- files from strangers ----------------------------------------------------------------------------------------------

WEIGHTS = "fold_0/weights.safetensors"
Members = dict[str, bytes]
Change = Callable[[Members], object]


def repack(source: Path, target: Path, change: Change = lambda members: None, **options: Any) -> Path:
    """The file with members changed, put into a zip without complaint."""
    with zipfile.ZipFile(source) as opened:
        members = {name: opened.read(name) for name in opened.namelist()}
    change(members)
    with zipfile.ZipFile(target, "w", **options) as opened:
        for name, data in members.items():
            opened.writestr(zipfile.ZipInfo(name), data, options.get("compression"))
    return target


def forge(source: Path, target: Path, change: Callable[[list[zipfile.ZipInfo]], object]) -> Path:
    """The file with a directory that tells other things than are there."""
    repack(source, target)
    with zipfile.ZipFile(target, "a") as opened:
        change(opened.infolist())
        # The directory is written anew where something was added.
        opened.comment = b"x"
    return target


def edit_manifest(members: Members, /, **changes: Any) -> None:
    members["manifest.json"] = json.dumps(json.loads(members["manifest.json"]) | changes).encode()


def add(name: str) -> Change:
    return lambda members: members.update({name: b"root::0:0::/root:/bin/sh\n"})


def flip_last_byte(members: Members, name: str) -> None:
    members[name] = members[name][:-1] + bytes([members[name][-1] ^ 1])


BAD_MEMBERS: dict[str, tuple[Change, str]] = {
    "traversal": (add("../../evil"), r"not an autoseg model \(the member '\.\./\.\./evil' has a name that leads"),
    "hidden traversal": (add("fold_0/../../evil"), "has a name that leads elsewhere"),
    "absolute": (add("/etc/cron.d/evil"), "member '/etc/cron.d/evil' has a name that leads elsewhere"),
    "drive": (add("C:evil"), "has a name that leads elsewhere"),
    "backslash": (add("..\\evil"), "has a name that leads elsewhere"),
    "folder": (add("fold_0/"), "has a name that leads elsewhere"),
    "empty name": (add(""), "has a name that leads elsewhere"),
    "extra member": (add("notes.txt"), r"damaged: what its manifest says of 'notes\.txt' is not so"),
    "extra fold": (add("fold_1/weights.safetensors"), "what its manifest says of 'fold_1/weights.safetensors'"),
    "missing member": (lambda members: members.pop(WEIGHTS), f"what its manifest says of '{WEIGHTS}' is not so"),
    "other length": (lambda members: members.update({WEIGHTS: b"short"}), f"says of '{WEIGHTS}' is not so"),
    "no manifest": (lambda members: members.pop("manifest.json"), r"not an autoseg model \(it has no manifest\.json"),
    "oversized": (
        lambda members: members.update({"plan.json": b" " * (16 * 2**20 + 1)}),
        r"'plan\.json' has 16777217 bytes, expected at most 16777216",
    ),
    "other kind": (lambda m: edit_manifest(m, format="spreadsheet"), "is of another kind of file"),
    "not JSON": (lambda m: m.update({"manifest.json": b"\xff{"}), r"not an autoseg model \(manifest\.json: "),
    "deep JSON": (lambda m: m.update({"manifest.json": b"[" * 100_000}), r"not an autoseg model \(manifest\.json: "),
    "a list": (lambda m: m.update({"manifest.json": b"[1]"}), r"manifest\.json: found \[1\], expected an object"),
    "newer": (
        lambda m: edit_manifest(m, version=FORMAT_VERSION + 1, ensemble=["2d"]),
        r"made by a newer autoseg \(format 5, this one reads 2 to 4\); update autoseg",
    ),
    "older": (lambda m: edit_manifest(m, version=0), r"made by an older autoseg \(format 0, .*; export the model"),
    "no version": (lambda m: edit_manifest(m, version=None), r"manifest\.json has no version"),
    "unknown key": (lambda m: edit_manifest(m, command="rm"), "unknown key 'command'"),
    "a fold less": (lambda m: edit_manifest(m, folds={"0": None}), "found the members .* for the folds 0"),
    "no fold": (lambda m: edit_manifest(m, folds={}), "for the folds none"),
    "other configuration": (lambda m: edit_manifest(m, configuration="2d"), "its manifest and its plan are of 2d and"),
    "plan": (
        lambda m: m.update({"plan.json": m["plan.json"].replace(b'"batch_size": 2', b'"batch_size": 3')}),
        r"damaged: the hash of plan\.json differs; copy or export",
    ),
}


@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_bad_members_are_refused_when_a_file_is_opened(file: Path, tmp_path: Path, name: str) -> None:
    change, message = BAD_MEMBERS[name]
    bad = repack(file, tmp_path / "bad.autoseg", change)
    with pytest.raises(FormatError, match=message) as caught:
        read_model(bad)
    assert str(caught.value).startswith(str(bad))
    assert [path.name for path in tmp_path.rglob("*")] == ["bad.autoseg"], "something was unpacked"


@pytest.mark.parametrize("name", [WEIGHTS, "fold_0/training.json"])
def test_a_changed_fold_is_refused_when_it_is_read(file: Path, tmp_path: Path, name: str) -> None:
    bad = repack(file, tmp_path / "bad.autoseg", lambda members: flip_last_byte(members, name))
    with pytest.raises(FormatError, match=f"is damaged: the hash of {name} differs; copy or export the model again"):
        Predictor(bad, device="cpu")
    assert Predictor(bad, device="cpu", folds=[2]).folds == (2,)


def test_an_unchanged_file_that_was_packed_anew_is_taken(file: Path, tmp_path: Path) -> None:
    """So that the tests above fail for the reason they name."""
    assert read_model(repack(file, tmp_path / "same.autoseg")).digest() == read_model(file).digest()
    assert read_model(forge(file, tmp_path / "also.autoseg", lambda infos: None)).digest() == read_model(file).digest()


def with_member(name: str, **changes: Any) -> Callable[[list[zipfile.ZipInfo]], None]:
    def change(infos: list[zipfile.ZipInfo]) -> None:
        info = next(info for info in infos if info.filename == name)
        for key, value in changes.items():
            setattr(info, key, value)

    return change


FORGED: dict[str, tuple[Callable[[list[zipfile.ZipInfo]], object], str]] = {
    "symlink": (with_member(WEIGHTS, external_attr=(stat.S_IFLNK | 0o777) << 16), "is a link or another special file"),
    "device": (with_member(WEIGHTS, external_attr=(stat.S_IFCHR | 0o666) << 16), "is a link or another special file"),
    "encrypted": (with_member(WEIGHTS, flag_bits=1), "is encrypted"),
    "nine gigabytes": (
        with_member(WEIGHTS, file_size=9 * 2**30, compress_size=9 * 2**30),
        "has 9663676416 bytes, expected at most 8589934592",
    ),
    "more than there is": (
        with_member(WEIGHTS, file_size=2**30, compress_size=2**30),
        "its members are larger than the file",
    ),
    "grows when read": (with_member(WEIGHTS, file_size=2**30), "is compressed"),
    "unknown method": (with_member(WEIGHTS, compress_type=99), "is compressed"),
    "a zero in its name": (with_member("plan.json", filename="plan.json\0.sh"), "has a name that leads elsewhere"),
    "renamed": (with_member(WEIGHTS, filename="../../../evil"), "has a name that leads elsewhere"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_directories_are_refused(file: Path, tmp_path: Path, name: str) -> None:
    change, message = FORGED[name]
    with pytest.raises(FormatError, match=message):
        read_model(forge(file, tmp_path / "bad.autoseg", change))


def test_a_name_in_the_directory_that_is_another_where_the_member_lies(file: Path, tmp_path: Path) -> None:
    def exchange(infos: list[zipfile.ZipInfo]) -> None:
        first, second = (next(info for info in infos if info.filename == f"fold_{k}/training.json") for k in (0, 2))
        first.header_offset, second.header_offset = second.header_offset, first.header_offset

    model = read_model(forge(file, tmp_path / "bad.autoseg", exchange))
    with pytest.raises(FormatError, match=r"is damaged: fold_0/training\.json cannot be read"):
        model.source.read_record(0)


def test_duplicates_are_refused(file: Path, tmp_path: Path) -> None:
    bad = repack(file, tmp_path / "bad.autoseg")
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(bad, "a") as opened:
        opened.writestr("plan.json", b"{}")
    with pytest.raises(FormatError, match="two members have the same name"):
        read_model(bad)


def test_a_bomb_is_refused_before_it_is_read(file: Path, tmp_path: Path) -> None:
    """A hundred megabytes in a hundred kilobytes."""
    bad = repack(
        file,
        tmp_path / "bad.autoseg",
        lambda members: members.update({WEIGHTS: bytes(10**8)}),
        compression=zipfile.ZIP_DEFLATED,
    )
    assert bad.stat().st_size < 10**6
    with pytest.raises(FormatError, match="is compressed"):
        read_model(bad)


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_file_that_is_cut_off(file: Path, tmp_path: Path, fraction: float) -> None:
    bad = tmp_path / "bad.autoseg"
    content = file.read_bytes()
    bad.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(FormatError, match="is damaged or cut off" if fraction else "is not an autoseg model"):
        read_model(bad)


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06" + bytes(18), b"{}", b"\x1f\x8b" + bytes(1000)])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    bad = tmp_path / "image.nii.gz"
    bad.write_bytes(content)
    with pytest.raises(FormatError, match=r"image\.nii\.gz: is not an autoseg model"):
        read_model(bad)


def with_weights(data: Callable[[bytes], bytes]) -> Change:
    """Other weights, with the hashes that belong to them."""

    def change(members: Members) -> None:
        members[WEIGHTS] = data(members[WEIGHTS])
        listed = json.loads(members["manifest.json"])["members"]
        listed[WEIGHTS] = {"n_bytes": len(members[WEIGHTS]), "sha256": hashlib.sha256(members[WEIGHTS]).hexdigest()}
        edit_manifest(members, members=listed)

    return change


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda data: b"\x07" * 500, "the weights of fold 0 are damaged"),
        (lambda data: data[:-8], "the weights of fold 0 are damaged"),
        (lambda data: b"", "the weights of fold 0 are damaged"),
        (lambda data: data.replace(b"heads.0.weight", b"heads.7.weight"), "the weights are of another network"),
        (lambda data: b"\x02" + bytes(7) + b"{}", "the weights are of another network"),
    ],
)
def test_weights_that_are_none(file: Path, tmp_path: Path, data: Callable[[bytes], bytes], message: str) -> None:
    bad = repack(file, tmp_path / "bad.autoseg", with_weights(data))
    with pytest.raises(TrainingError, match=message) as caught:
        Predictor(bad, device="cpu")
    assert str(caught.value).startswith(str(bad))


def test_no_flipped_bit_goes_unnoticed(file: Path, tmp_path: Path) -> None:
    """Each is an error in words, or in a place that nobody reads, such as the time of a member."""
    content = file.read_bytes()
    expected = read_model(file).digest()
    rng = np.random.default_rng(0)
    # Everywhere, and more often in the directory at the end.
    places = [*rng.integers(0, len(content), 200), *rng.integers(len(content) - 900, len(content), 400)]
    messages = []
    for place in places:
        bad = tmp_path / "bad.autoseg"
        bad.write_bytes(content[:place] + bytes([content[place] ^ (1 << int(rng.integers(8)))]) + content[place + 1 :])
        try:
            model = read_model(bad)
            read = [(model.source.read_record(fold), model.source.read_weights(fold)) for fold in (0, 2)]
        except AutosegError as error:
            messages.append(str(error))
        else:
            assert model.digest() == expected
            assert [weights.progress for _, weights in read] == [None, None]
    assert len(messages) > 300
    assert all(message.startswith(str(bad)) for message in messages)
