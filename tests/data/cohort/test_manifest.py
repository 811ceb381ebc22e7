"""A manifest is refused when results could leak, paths could escape or labels make no sense."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartlab import DataError, UseError, load_manifest
from smartlab.data.cohort.case import Case, LabelSpec, Lesion
from smartlab.data.cohort.manifest import Manifest, Source, manifest_folder, schema


def make(cases, **fields):
    facts = {
        "name": "toy",
        "title": "Toy",
        "modality": "CT",
        "licence": "CC BY 4.0",
        "citation": "-",
        "homepage": "-",
    }
    labels = {"pathology": LabelSpec(kind="binary", classes=["benign", "malignant"])}
    return Manifest(**(facts | {"source": Source(kind="local"), "labels": labels, "cases": cases} | fields))


def write(tmp_path, change):
    man = make([Case(id="a", patient="p", image="a.nii.gz")])
    path = man.save(tmp_path / "toy.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


patients = st.sampled_from(["p1", "p2", "p3", "p4"])


@given(st.lists(st.tuples(patients, st.sampled_from(["train", "val", "test"])), min_size=1, max_size=12))
def test_splits_that_share_a_patient_are_refused_and_only_those(rows):
    cases = [Case(id=str(i), patient=p, split=s) for i, (p, s) in enumerate(rows)]
    leaks = any(len({s for q, s in rows if q == p}) > 1 for p, _ in rows)
    if leaks:
        with pytest.raises(ValueError, match="more than one split"):
            make(cases)
    else:
        assert len(make(cases).cases) == len(rows)


@pytest.mark.parametrize("other", ["a.nii.gz", "./a.nii.gz"])
def test_an_image_of_two_patients_is_refused(other):
    first = Case(id="1", patient="p1", image="a.nii.gz", split="train")
    with pytest.raises(ValueError, match="belongs to two patients"):
        make([first, Case(id="2", patient="p2", image=other, split="test")])
    make([first, Case(id="2", patient="p1", image=other, split="train")])  # two lesions of one scan


def test_a_case_without_patient_and_a_lesion_nowhere_are_refused():
    with pytest.raises(ValueError, match="need a name"):
        make([Case(id="1", patient="", image="a.nii.gz")])
    with pytest.raises(ValueError, match="finite number"):
        Lesion(center_mm=(float("nan"), 0, 0))


@given(st.lists(st.tuples(patients, st.integers(0, 4)), min_size=1, max_size=12))
def test_folds_that_share_a_patient_are_refused_and_only_those(rows):
    cases = [Case(id=str(i), patient=p, fold=f) for i, (p, f) in enumerate(rows)]
    if len({p for p, _ in rows}) < len({(p, f) for p, f in rows}):
        with pytest.raises(ValueError, match="more than one fold"):
            make(cases)
    else:
        make(cases)


@pytest.mark.parametrize(
    "path", ["../secret.nii", "/etc/passwd", "a/../../b.nii", "C:\\scan.nii", "a\\b.nii", ""]
)
def test_paths_cannot_leave_the_root(path):
    with pytest.raises(ValueError, match="below the data root"):
        Case(id="a", patient="p", image=path)
    with pytest.raises(ValueError, match="below the data root"):
        Case(id="a", patient="p", masks={"tumour": path})


def test_a_link_cannot_lead_out_of_the_root(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "secret.nii").write_bytes(b"x")
    (tmp_path / "root" / "scan.nii").symlink_to(tmp_path / "secret.nii")
    with pytest.raises(DataError, match="leads out"):
        Case(id="a", patient="p", image="scan.nii").locate(tmp_path / "root")


text = st.text("abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=8)
numbers = st.floats(-1e4, 1e4).map(lambda x: round(x, 3))
lesions = st.builds(
    Lesion,
    center_mm=st.tuples(numbers, numbers, numbers),
    box_mm=st.none() | st.tuples(numbers, numbers, numbers),
    diameter_mm=st.none() | numbers,
    frame=st.sampled_from(["world", "image"]),
)
cases = st.builds(
    Case,
    id=text,
    patient=text,
    image=st.none() | text.map(lambda t: f"{t}.nii.gz"),
    labels=st.fixed_dictionaries(
        {},
        optional={
            "pathology": st.sampled_from(["benign", "malignant"]),
            "margins": st.lists(
                st.sampled_from(["spiculated", "obscured"]), min_size=1, max_size=2, unique=True
            ),
            "age": numbers,
            "ratings": st.lists(numbers, min_size=1, max_size=4),
        },
    ),
    masks=st.dictionaries(text, text, max_size=2),
    lesion=st.none() | lesions,
    fold=st.none() | st.integers(0, 4),
    excluded=st.none() | text,
)
LABELS = {
    "pathology": LabelSpec(kind="binary", classes=["benign", "malignant"]),
    "margins": LabelSpec(kind="multilabel", classes=["spiculated", "obscured"]),
    "age": LabelSpec(kind="number"),
    "ratings": LabelSpec(kind="numbers"),
}


@given(
    st.lists(cases, max_size=6, unique_by=(lambda c: c.id, lambda c: c.patient, lambda c: c.image or c.id)),
    st.booleans(),
)
def test_what_is_saved_is_what_is_read(tmp_path_factory, rows, as_csv):
    man = make(rows, labels=LABELS, cases_file="toy.csv" if as_csv else None)
    path = man.save(tmp_path_factory.mktemp("m") / "toy.json")
    assert load_manifest(path).all_cases == man.all_cases


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_case_table_is_read_as_spreadsheets_write_it(tmp_path, separator, mark, end):
    man = make([Case(id=i, patient=i, image=f"{i}.nii") for i in "ab"], cases_file="toy.csv")
    path = man.save(tmp_path / "toy.json")
    text = (tmp_path / "toy.csv").read_text() + ",,\n\n"
    text = mark + text.replace(",", separator).replace("\n", end)
    (tmp_path / "toy.csv").write_text(text, encoding="utf-8", newline="")
    assert load_manifest(path).all_cases == man.all_cases


@pytest.mark.parametrize(
    ("table", "hint"),
    [
        (b"id,patient\na,p\nb,q,r,s\n", "line 3 has 4 cells for 2 columns"),
        (b"id,patient\na,p\n\n,q\n", "no id.*line 4"),
        (b"id,image\na,a.nii\n", "no patient.*line 2"),
        ("id,patient\né,p\n".encode("latin-1"), "not a CSV in UTF-8.*CSV UTF-8"),
    ],
)
def test_what_is_wrong_in_a_case_table_is_named_with_file_and_line(tmp_path, table, hint):
    make([], cases_file="toy.csv").save(tmp_path / "toy.json")
    (tmp_path / "toy.csv").write_bytes(table)
    with pytest.raises(DataError, match=rf"toy\.csv: .*{hint}"):
        load_manifest(tmp_path / "toy.json")


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (lambda m: m.update(licens="x"), "licens"),
        (lambda m: m.pop("name"), "name"),
        (lambda m: m["cases"].append(m["cases"][0]), "appears twice"),
        (lambda m: m["cases"][0].update(labels={"grade": 1}), "does not describe"),
        (lambda m: m["cases"][0].update(labels={"pathology": "unsure"}), "not one of"),
        (lambda m: m["cases"][0].update(series_uid="1.2.x"), "DICOM UID"),
        (lambda m: m["cases"][0].update(masks={"t": "series:abc"}), "series:<UID>"),
        (lambda m: m.update(schema_version=9), "schema_version"),
        (lambda m: m.update(cases_file="../x.csv"), "below the data root"),
        (lambda m: m.update(cases_file="absent.csv"), "absent.csv"),
    ],
)
def test_a_wrong_manifest_is_refused_naming_the_fault(tmp_path, change, hint):
    with pytest.raises(DataError, match=hint) as caught:
        load_manifest(write(tmp_path, change))
    assert "toy.json" in str(caught.value)


def test_of_ones_own_data_only_the_name_and_the_cases_are_needed(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"name": "mine", "cases": [{"id": "a", "patient": "p", "image": "a.nii.gz"}]}')
    man = load_manifest(path)
    assert (man.licence, man.source.kind, man.modality, len(man.cases)) == ("own data", "local", "CT", 1)
    assert load_manifest(man.save(tmp_path / "again.json")) == man


def test_a_wrong_manifest_is_told_all_its_problems_at_once(tmp_path):
    def spoil(content):
        content["cases"][0]["image"] = "../a.nii.gz"
        content["cases"].append({"id": "b"})
        content["licens"] = "x"

    with pytest.raises(DataError) as caught:
        load_manifest(write(tmp_path, spoil))
    for words in ("3 problems", "below the data root", "cases.1.patient: Field required", "licens"):
        assert words in str(caught.value)
    twice = [Case(id="a", patient="p", labels={"grade": 1})] * 2
    with pytest.raises(ValueError, match=r"(?s)3 problems.*does not describe.*appears twice"):
        make(twice)


def test_an_unknown_name_lists_the_shipped_ones():
    with pytest.raises(UseError, match="lidc-nodules"):
        load_manifest("lidc")


def test_excluded_cases_are_kept_but_not_used():
    man = make([Case(id="a", patient="p"), Case(id="b", patient="q", excluded="rated 3")])
    assert [c.id for c in man.cases] == ["a"] and len(man.all_cases) == 2


def test_cases_on_one_image_share_it():
    man = make(
        [Case(id=str(i), patient="p", image="scan.nii") for i in range(3)]
        + [Case(id="x", patient="q", image="y.nii")]
    )
    assert [(g.key, len(g.cases)) for g in man.images()] == [("scan.nii", 3), ("y.nii", 1)]


def test_selecting_an_unknown_case_is_an_error():
    man = make([Case(id="a", patient="p")])
    assert [c.id for c in man.select(["a"]).cases] == ["a"]
    with pytest.raises(UseError, match="not in toy"):
        man.select(["zz"])


def several(**changes):
    cases = [
        {"id": f"c{i}", "patient": f"p{i}", "channels": {"t1": f"{i}a.nii", "t2": f"{i}b.nii"}}
        for i in range(2)
    ]
    cases[1] |= changes
    return {"name": "two", "modality": "MR", "cases": cases}


def test_channels_come_through_json_and_csv(tmp_path):
    for more in ({}, {"cases_file": "cases.csv"}):
        man = Manifest.model_validate(several() | more)
        assert man.channels == ["t1", "t2"] and man.cases[1].image == "1a.nii"
        assert load_manifest(man.save(tmp_path / "m.json")) == man


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"channels": {"t2": "b.nii", "t1": "a.nii"}}, "has the channels t2, t1, the first case t1, t2"),
        ({"channels": {}, "image": "a.nii"}, "has the channels none, the first case t1, t2"),
        ({"channels": {"t1": "a.nii", "t2": "../b.nii"}}, "below the data root"),
        ({"image": "b.nii"}, "leave `image` out"),
        ({"channels": {"t1": "1a.nii", "t2": "0b.nii"}}, "belongs to two patients"),
        ({"patient": "p0", "channels": {"t1": "0a.nii", "t2": "1b.nii"}}, "other images beside it"),
    ],
)
def test_channels_that_cannot_be_trained_on_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Manifest.model_validate(several(**change))


def test_the_committed_schema_is_the_code_s():
    assert json.loads((manifest_folder() / "schema.json").read_text(encoding="utf-8")) == schema()
