"""Public datasets that are archives on the web: their cases are listed once they are fetched.

`source.files` says what to download; `source.parameters["layout"]` says where in the unpacked
archive the images are, for `compose.cases_from_folder`:

    image      regular expression on the path below the root; its groups `id`, `fold`, `part` …
    masks      {name: path} and `label_map`: paths in which {id} and the other groups are filled in
    masks_in   a folder of binary masks, each named for what it shows
    splits     {part: split}, or `table` = {file, separator, key, split} for a split column
    lesions    {file, key, center, diameter}: a table of lesion centres (DICOM LPS mm), many per image
    patients   "idc" where `id` is a series UID whose patient the index of public series knows
    npz        MedMNIST's arrays, written out as one NIfTI per sample by `fetch`; `label` and `classes`

Checksums and sizes are given where we know them: MONAI's and MedMNIST's own lists, and Zenodo's
MD5 as quoted alike by several public download scripts. An unknown one is left out, and said.
"""

from __future__ import annotations

from typing import Any

from smartlab.data.manifest import LabelSpec, Manifest, Source

ZENODO = "https://zenodo.org/records/"


def _file(url: str, size: int | None = None, md5: str | None = None) -> dict[str, Any]:
    known = {"url": url, "name": url.rsplit("/", 1)[1], "md5": md5, "size_mb": size and round(size / 1e6, 3)}
    return {key: value for key, value in known.items() if value}


def _archive(
    files: list[dict[str, Any]], layout: dict[str, Any], size_gb: float | None = None, **kw: Any
) -> Manifest:
    sizes = [f.get("size_mb") for f in files]
    known = round(sum(s or 0 for s in sizes) / 1000, 1) if all(sizes) else None
    source = Source(
        kind=kw.pop("kind", "url"),
        location=kw.pop("location", ""),
        files=files,
        size_gb=known or size_gb,
        parameters={"layout": layout},
        notes=kw.pop("access"),
    )
    kw["notes"] = ["Cases are listed when the archive is fetched: `smartlab data fetch` writes manifest.json there."] + [
        f"Checksum of {f['name']} not known to us: only its length is checked." for f in files if "md5" not in f
    ] + kw.pop("remarks", [])  # fmt: skip
    return Manifest(modality="CT", source=source, **kw)


def msd_lung() -> Manifest:
    task = "Task06_Lung"
    return _archive(
        kind="msd",
        location=task,
        files=[
            _file(
                f"https://msd-for-monai.s3-us-west-2.amazonaws.com/{task}.tar",
                9_163_696_640,
                "8afd997733c7fc0432f71255ba4e52dc",
            )
        ],
        layout={
            "image": rf"{task}/imagesTr/(?P<id>lung_\d+)\.nii\.gz",
            "masks": {"tumour": f"{task}/labelsTr/{{id}}.nii.gz"},
        },
        access="No account is needed. Download address and MD5 are those of monai.apps.DecathlonDataset.",
        name="msd-lung",
        title="Medical Segmentation Decathlon, task 6: lung tumours",
        licence="CC BY-SA 4.0",
        citation="Antonelli M, et al. The Medical Segmentation Decathlon. Nature Communications 13, 4128 (2022). "
        "https://doi.org/10.1038/s41467-022-30695-9",
        homepage="http://medicaldecathlon.com/",
        description="The labelled CT of non-small-cell lung cancer (imagesTr, 64 announced); the 32 unlabelled ones are not used.",
        remarks=[
            "The images are from NSCLC Radiogenomics: never pretrain on one and test on the other. No patient key to "
            "that collection is published; each image counts as one patient."
        ],
    )


def totalsegmentator() -> Manifest:
    return _archive(
        files=[
            _file(
                f"{ZENODO}10047292/files/Totalsegmentator_dataset_v201.zip",
                23_581_218_285,
                "fe250e5718e0a3b5df4c4ea9d58a62fe",
            )
        ],
        layout={
            "image": r"(?:[^/]+/)?(?P<id>s\d{4})/ct\.nii\.gz",
            "masks_in": "segmentations",
            "table": {"file": "meta.csv", "separator": ";", "key": "image_id", "split": "split"},
        },
        access="No account is needed.",
        name="totalsegmentator",
        title="TotalSegmentator v2.0.1: 117 structures on CT",
        licence="CC BY 4.0",
        citation="Wasserthal J, et al. TotalSegmentator: Robust Segmentation of 104 Anatomic Structures in CT Images. "
        "Radiology: Artificial Intelligence 5(5), e230024 (2023). https://doi.org/10.1148/ryai.230024",
        homepage=f"{ZENODO}10047292",
        description="1,228 CT at 1.5 mm with 117 binary masks each, and the authors' split (in meta.csv).",
        remarks=[
            "One image per subject: each counts as one patient. Labels are a model's output, corrected by hand."
        ],
    )


AMOS_ORGANS = (
    "spleen", "kidney_right", "kidney_left", "gallbladder", "esophagus", "liver", "stomach", "aorta",
    "inferior_vena_cava", "pancreas", "adrenal_gland_right", "adrenal_gland_left", "duodenum", "bladder",
    "prostate_or_uterus",
)  # fmt: skip


def amos22() -> Manifest:
    return _archive(
        files=[_file(f"{ZENODO}7262581/files/amos22.zip")],
        size_gb=24.0,
        layout={
            "image": r"amos22/images(?P<part>Tr|Va)/(?P<id>amos_0(?:[0-4]\d\d|500))\.nii\.gz",
            "label_map": "amos22/labels{part}/{id}.nii.gz",
            "splits": {"Tr": "train", "Va": "val"},
        },
        access="No account is needed for the labelled part used here. The size, about 24 GB, is approximate.",
        name="amos22",
        title="AMOS 2022: fifteen abdominal organs on CT",
        licence="CC BY 4.0",
        citation="Ji Y, et al. AMOS: A Large-Scale Abdominal Multi-Organ Benchmark for Versatile Medical Image "
        "Segmentation. NeurIPS Datasets and Benchmarks (2022). https://arxiv.org/abs/2206.08023",
        homepage=f"{ZENODO}7262581",
        description="200 training and 100 validation CT with labels; MRI (numbers above 500) and the unlabelled test part "
        "are not used.",
        organs=dict(enumerate(AMOS_ORGANS, start=1)),
        remarks=[
            "Licence as stated with the Zenodo record; the paper's page names a non-commercial one. Ask the authors "
            "before commercial use.",
            "No patient key is published: each image counts as one patient.",
        ],
    )


# Zenodo's records 3723295 (part 1) and 4121926 (part 2): bytes and MD5 of each archive.
_LUNA16 = (
    (6_811_924_508, "1065b0f42b8c25cf29260fd924a3c3a2"),
    (6_334_778_552, "2eda28bb123543074f5cd849499b87ff"),
    (7_257_937_108, "685b484b085bcdb81c525f3b1bf97c51"),
    (6_896_620_114, "54707e9e8954af29326eed60f38ea321"),
    (6_856_144_330, "98225ccb1a41fc434631f63f4284796a"),
    (6_610_460_097, "395ec714c4123cf213fb7b08f05ee9cc"),
    (6_531_050_274, "d162df1444a6f2674ab8273c7f9e1520"),
    (6_313_598_213, "e99b8921990d1414bb5e92130371e8a3"),
    (6_025_767_505, "38260ca9a8741888997bcebedfabc3f1"),
    (6_699_650_017, "e55c473bbeebd712eb2224a58998be8e"),
)


def luna16() -> Manifest:
    subsets = [
        _file(f"{ZENODO}{3723295 if k < 7 else 4121926}/files/subset{k}.zip", size, md5)
        for k, (size, md5) in enumerate(_LUNA16)
    ]
    table = _file(f"{ZENODO}3723295/files/annotations.csv", 136_986, "f4404df491aee6445a4485061bfdffdd")
    return _archive(
        files=[table, *subsets],
        layout={
            "image": r"(?:[^/]+/)?subset(?P<fold>\d)/(?P<id>[0-9.]+)\.mhd",
            "patients": "idc",
            "lesions": {
                "file": "annotations.csv",
                "key": "seriesuid",
                "center": ["coordX", "coordY", "coordZ"],
                "diameter": "diameter_mm",
            },
        },
        access="No account is needed.",
        name="luna16",
        title="LUNA16: lung nodule analysis on 888 scans of LIDC-IDRI",
        licence="CC BY 4.0",
        citation="Setio AAA, et al. Validation, comparison, and combination of algorithms for automatic detection of "
        "pulmonary nodules in computed tomography images: the LUNA16 challenge. Medical Image Analysis 42, 1-13 (2017). "
        "https://doi.org/10.1016/j.media.2017.06.015",
        homepage="https://luna16.grand-challenge.org/",
        description="888 CT of LIDC-IDRI with slices of at most 2.5 mm and 1,186 nodules marked by at least three readers; "
        "folds are the challenge's ten subsets.",
        remarks=[
            "The same scans as lidc-nodules, as MetaImage files. A scan has one case per nodule, or one without any."
        ],
    )


def _medmnist(
    name: str, flag: str, md5: str, title: str, label: str, kind: Any, classes: list[str], **kw: Any
) -> Manifest:
    counts = kw.pop("counts")
    return _archive(
        files=[_file(f"{ZENODO}10519652/files/{flag}_64.npz", md5=md5)],
        layout={"npz": f"{flag}_64.npz", "label": label, "classes": classes},
        size_gb=round(sum(counts.values()) * 64**3 / 1e9, 2),
        access="No account is needed. The size is that of the voxels, before compression. The 28-voxel version: "
        + kw.pop("small"),
        name=name,
        title=title,
        licence="CC BY 4.0",
        citation="Yang J, et al. MedMNIST v2: A large-scale lightweight benchmark for 2D and 3D biomedical image "
        "classification. Scientific Data 10, 41 (2023). https://doi.org/10.1038/s41597-022-01721-8",
        homepage="https://medmnist.com/",
        labels={label: LabelSpec(kind=kind, classes=classes)},
        description=f"{kw.pop('what')}, 64³ voxels; official split of {counts['train']} / {counts['val']} / {counts['test']}.",
        remarks=[
            "Grey values from 0 to 255, not HU, and a nominal spacing of 1 mm: set the intensity window accordingly.",
            "The archive says nothing about patients: each sample counts as one, so the official split cannot be "
            "checked for patients on both sides.",
            *kw.pop("also", []),
        ],
    )


def medmnist_nodule3d() -> Manifest:
    return _medmnist(
        "medmnist-nodule3d",
        "nodulemnist3d",
        "c47c5b7d457bf6332200d2ea6d64ecd8",
        "NoduleMNIST3D: benign and malignant nodules of LIDC-IDRI",
        "malignancy",
        "binary",
        ["benign", "malignant"],
        counts={"train": 1158, "val": 165, "test": 310},
        what="Nodules of LIDC-IDRI, benign (rated 1 or 2) or malignant (4 or 5)",
        small=f"{ZENODO}10519652/files/nodulemnist3d.npz, MD5 8755a7e9e05a4d9ce80a24c3e7a256f3.",
        also=["The nodules are those of LIDC-IDRI: do not mix with lidc-nodules."],
    )


def medmnist_organ3d() -> Manifest:
    organs = ("liver", "kidney_right", "kidney_left", "femur_right", "femur_left", "bladder", "heart", "lung_right",
              "lung_left", "spleen", "pancreas")  # fmt: skip
    return _medmnist(
        "medmnist-organ3d",
        "organmnist3d",
        "58a2205adf14a9d0a189cb06dc78bf10",
        "OrganMNIST3D: eleven organs on abdominal CT",
        "organ",
        "multiclass",
        list(organs),
        counts={"train": 971, "val": 161, "test": 610},
        what="Boxes around organs of the LiTS abdominal CT",
        small=f"{ZENODO}10519652/files/organmnist3d.npz, MD5 a0c5a1ff56af4f155c46d46fbb45a2fe.",
        also=["By its authors: 115, 16 and 70 scans in train, val and test, so no scan is on both sides."],
    )
