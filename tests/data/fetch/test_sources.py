"""Fetching resumes, verifies, stays inside its folder, and says at once when there is no network."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import stat
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartlab import DataError, UseError, fetch, load_manifest
from smartlab.data.cohort.case import Case
from smartlab.data.cohort.manifest import Manifest, Source
from smartlab.data.fetch import download, sources

CONTENT = np.random.default_rng(0).bytes(300_000)


class Server(BaseHTTPRequestHandler):
    """Serves `files`; understands ranges; cuts the first `cuts` answers half way."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        state = self.server.state
        state["requests"].append((self.command, self.headers.get("Range")))
        content = state["files"].get(self.path.lstrip("/"))
        if content is None or self.path in state["broken"]:
            return self.send_error(503 if content is not None else 404)
        etag, start = f'"{hashlib.md5(content).hexdigest()}"', 0
        if (
            (asked := self.headers.get("Range"))
            and self.headers.get("If-Range", etag) == etag
            and state["ranges"]
        ):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        if start > 0 and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        body = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", etag)
        self.end_headers()
        if self.command == "GET":
            if state["cuts"] > 0:
                state["cuts"] -= 1
                body = body[: len(body) // 2]
            self.wfile.write(body)
        self.close_connection = True
        return None


@pytest.fixture
def web(monkeypatch):
    monkeypatch.setattr(download, "BACKOFF", 0.01)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.state = {"files": {"a.bin": CONTENT}, "requests": [], "cuts": 0, "broken": set(), "ranges": True}
    server.state["url"] = f"http://127.0.0.1:{server.server_address[1]}/"
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server.state
    server.shutdown()


def md5(content):
    return hashlib.md5(content).hexdigest()


# ---- one file ----


def test_a_file_arrives_whole_and_is_not_fetched_twice(web, tmp_path):
    arrived = []
    path = download.download(web["url"] + "a.bin", tmp_path / "a", md5=md5(CONTENT), progress=arrived.append)
    assert path.read_bytes() == CONTENT and sum(arrived) == len(CONTENT)
    download.download(web["url"] + "a.bin", tmp_path / "a")
    assert len(web["requests"]) == 1 and [p.name for p in tmp_path.iterdir()] == ["a"]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, len(CONTENT)))
def test_what_is_there_already_is_not_asked_for_again(have):
    import tempfile
    from pathlib import Path

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.state = {"files": {"a.bin": CONTENT}, "requests": [], "cuts": 0, "broken": set(), "ranges": True}
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.part").write_bytes(CONTENT[:have])
        arrived = []
        url = f"http://127.0.0.1:{server.server_address[1]}/a.bin"
        path = download.download(url, Path(folder) / "a", md5=md5(CONTENT), progress=arrived.append)
        assert path.read_bytes() == CONTENT and sum(arrived) == len(CONTENT) - have
    server.shutdown()


def test_a_connection_that_breaks_is_taken_up_where_it_broke(web, tmp_path):
    web["cuts"] = 3
    path = download.download(web["url"] + "a.bin", tmp_path / "a", sha256=hashlib.sha256(CONTENT).hexdigest())
    assert path.read_bytes() == CONTENT
    starts = [int(r.removeprefix("bytes=").rstrip("-")) for _, r in web["requests"] if r]
    assert starts == sorted(starts) and len(starts) == 3 and starts[0] == len(CONTENT) // 2


def test_a_server_without_ranges_starts_again_and_still_gives_the_file(web, tmp_path):
    web["ranges"] = False
    (tmp_path / "a.part").write_bytes(CONTENT[:1000])
    arrived = []
    path = download.download(web["url"] + "a.bin", tmp_path / "a", md5=md5(CONTENT), progress=arrived.append)
    assert path.read_bytes() == CONTENT and sum(arrived) == len(CONTENT) - 1000


def test_two_versions_of_a_file_are_never_mixed(web, tmp_path):
    web["cuts"] = 1
    newer = CONTENT[::-1]
    first = download._receive
    try:
        with pytest.raises(ConnectionError):
            first(web["url"] + "a.bin", tmp_path / "a.part", lambda n: None)
    finally:
        web["files"]["a.bin"] = newer
    assert download.download(web["url"] + "a.bin", tmp_path / "a").read_bytes() == newer


def test_a_partial_file_longer_than_the_file_is_thrown_away(web, tmp_path):
    (tmp_path / "a.part").write_bytes(CONTENT + b"x")
    assert download.download(web["url"] + "a.bin", tmp_path / "a").read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_no_file_and_names_both(web, tmp_path):
    with pytest.raises(DataError, match=rf"md5 checksum is wrong.*found {md5(CONTENT)}.*expected 0000"):
        download.download(web["url"] + "a.bin", tmp_path / "a", md5="0" * 32)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_refused_at_once(web, tmp_path):
    with pytest.raises(DataError, match="HTTP 404"):
        download.download(web["url"] + "b.bin", tmp_path / "b")
    assert len(web["requests"]) == 1


def test_a_server_that_keeps_failing_ends_in_one_error(web, tmp_path):
    web["broken"].add("/a.bin")
    with pytest.raises(DataError, match=r"keeps failing.*HTTP 503.*continues at 0 MB"):
        download.download(web["url"] + "a.bin", tmp_path / "a")


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://example.org/a", "/etc/hostname"])
def test_only_web_addresses_are_fetched(url, tmp_path):
    with pytest.raises(UseError, match="only web addresses"):
        download.download(url, tmp_path / "a")
    with pytest.raises(UseError, match="only web addresses"):
        download.unreachable(url)


# ---- archives ----


def zipped(path, members, mode=None):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (mode or (stat.S_IFREG | 0o644)) << 16
            file.writestr(info, content)
    return path


def tarred(path, *members):
    with tarfile.open(path, "w") as file:
        for member, content in members:
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def tar_member(name, kind=tarfile.REGTYPE, link=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


def test_archives_unpack_into_their_folder(tmp_path):
    zipped(tmp_path / "a.zip", {"s1/ct.nii.gz": b"one", "meta.csv": b"two"})
    tarred(tmp_path / "b.tar", (tar_member("s2/ct.nii.gz"), b"three"))
    assert download.unpack(tmp_path / "a.zip", tmp_path / "out") == 2
    assert download.unpack(tmp_path / "b.tar", tmp_path / "out") == 1
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == {"s1/ct.nii.gz", "meta.csv", "s2/ct.nii.gz"}


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil", "C:/evil", "a\\..\\..\\evil"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_that_climbs_out_is_refused_before_anything_is_written(tmp_path, name, kind):
    if kind == "zip":
        path = zipped(tmp_path / "a.zip", {"good": b"1", name: b"2"})
    else:
        path = tarred(tmp_path / "a.tar", (tar_member("good"), b"1"), (tar_member(name), b"2"))
    with pytest.raises(DataError, match="unsafe, and nothing was unpacked"):
        download.unpack(path, tmp_path / "out" / "deep")
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    path = tarred(
        tmp_path / "a.tar", (tar_member("good"), b"1"), (tar_member("bad", kind, "/etc/hostname"), b"")
    )
    with pytest.raises(DataError, match="a link or device"):
        download.unpack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_in_a_zip_are_refused(tmp_path):
    path = zipped(tmp_path / "a.zip", {"bad": b"/etc"}, mode=stat.S_IFLNK | 0o777)
    with pytest.raises(DataError, match="a link or device"):
        download.unpack(path, tmp_path / "out")


def test_a_link_already_in_the_folder_is_not_followed_out(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "s1").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="through a link"):
        download.unpack(zipped(tmp_path / "a.zip", {"s1/x": b"1"}), tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_damaged_archive_is_named(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK nonsense")
    with pytest.raises(DataError, match="damaged archive"):
        download.unpack(tmp_path / "a.zip", tmp_path / "out")


# ---- whole datasets from the web ----


def web_manifest(web, layout=None, **files):
    web["files"] |= files
    facts = [
        {"url": web["url"] + name, "name": name, "md5": md5(content), "size_mb": len(content) / 1e6}
        for name, content in files.items()
    ]
    return Manifest(
        name="toy", title="Toy", modality="CT", licence="CC BY 4.0", citation="-", homepage="-",
        source=Source(kind="url", files=facts, parameters={"layout": layout} if layout else {}),
    )  # fmt: skip


@pytest.fixture
def archive(tmp_path):
    path = zipped(tmp_path / "a.zip", {f"s{k}/ct.nii.gz": b"x" * 1000 for k in range(3)})
    return path.read_bytes()


LAYOUT = {"image": r"(?P<id>s\d)/ct\.nii\.gz"}


def test_fetch_unpacks_lists_the_cases_and_does_nothing_the_second_time(web, archive, tmp_path):
    man = web_manifest(web, LAYOUT, **{"a.zip": archive, "table.csv": b"1,2\n"})
    report = fetch(man, tmp_path / "root", progress=False)
    assert report.ok and sorted(report.fetched) == ["a.zip", "table.csv"]
    listed = load_manifest(tmp_path / "root")
    assert [c.image for c in listed.cases] == [f"s{k}/ct.nii.gz" for k in range(3)]
    assert (tmp_path / "root" / "table.csv").exists() and not list((tmp_path / "root").rglob("*.zip"))
    web["requests"].clear()
    again = fetch(man, tmp_path / "root", progress=False)
    assert again.fetched == [] and sorted(again.skipped) == ["a.zip", "table.csv"] and not web["requests"]


def test_one_bad_file_does_not_stop_the_others(web, archive, tmp_path):
    man = web_manifest(web, LAYOUT, **{"bad.csv": b"1", "a.zip": archive})
    web["files"]["bad.csv"] = b"changed"
    report = fetch(man, tmp_path / "root", progress=False)
    assert not report.ok and report.fetched == ["a.zip"] and "checksum" in report.failed["bad.csv"]
    assert (tmp_path / "root" / "s1" / "ct.nii.gz").exists()
    web["files"]["bad.csv"] = b"1"
    assert fetch(man, tmp_path / "root", progress=False).fetched == ["bad.csv"]


def test_a_hostile_archive_is_a_failure_and_writes_nothing(web, tmp_path):
    bad = zipped(tmp_path / "b.zip", {"../../evil": b"1"}).read_bytes()
    report = fetch(web_manifest(web, None, **{"b.zip": bad}), tmp_path / "deep" / "root", progress=False)
    assert "unsafe" in report.failed["b.zip"] and not list(tmp_path.rglob("evil"))


def test_a_file_name_that_leaves_the_folder_is_refused(web, tmp_path):
    man = web_manifest(web, None, **{"a.csv": b"1"})
    man.source.files[0]["name"] = "../a.csv"
    with pytest.raises(DataError, match="not a plain file name"):
        fetch(man, tmp_path / "root", progress=False)


def test_medmnist_samples_become_images_that_can_be_read(web, tmp_path):
    from smartlab import read_volume

    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    images = {f"{s}_images": rng.integers(0, 256, (2, 8, 8, 8), np.uint8) for s in ("train", "val", "test")}
    np.savez_compressed(
        buffer, **images, **{k.replace("images", "labels"): np.array([[0], [1]]) for k in images}
    )
    layout = {"npz": "toy.npz", "label": "malignancy", "classes": ["benign", "malignant"]}
    man = web_manifest(web, layout, **{"toy.npz": buffer.getvalue()})
    man = man.model_copy(update={"labels": load_manifest("medmnist-nodule3d").labels})
    fetch(man, tmp_path / "root", progress=False)
    listed = load_manifest(tmp_path / "root")
    assert [c.labels["malignancy"] for c in listed.cases] == ["benign", "malignant"] * 3
    image = read_volume(listed.cases[1].locate(tmp_path / "root"))
    assert np.array_equal(np.sort(image.array.ravel()), np.sort(images["train_images"][1].ravel()))


# ---- no network, and nothing to fetch ----


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(download.urllib.request, "urlopen", refuse)


@pytest.mark.parametrize(
    ("name", "size"),
    [("pancreas-ct", "10.2 GB"), ("msd-lung", "9.2 GB"), ("ct-open", "GB"), ("amos22", "24.0 GB")],
)
def test_without_network_it_fails_in_seconds_saying_what_and_how_large(offline, tmp_path, name, size):
    begin = time.perf_counter()
    with pytest.raises(DataError, match=rf"cannot reach.*nothing fetched.*item\(s\), .*{size}"):
        fetch(name, tmp_path / "root", progress=False)
    assert time.perf_counter() - begin < 5


def test_a_name_server_that_never_answers_does_not_hold_us_up(monkeypatch):
    over = threading.Event()

    def hang(*args, **kwargs):
        over.wait(30)
        raise OSError("at last")

    monkeypatch.setattr(download.urllib.request, "urlopen", hang)
    begin = time.perf_counter()
    assert "no answer" in download.unreachable("https://example.org", seconds=0.2)
    assert time.perf_counter() - begin < 2
    over.set()


def test_a_dry_run_lists_and_sizes_without_any_request(offline, tmp_path):
    report = fetch("lidc-nodules", tmp_path / "root", dry_run=True)
    assert len(report.items) == 638 and not (tmp_path / "root").exists()
    assert f"638 item(s), {load_manifest('lidc-nodules').source.size_gb} GB" in str(
        report
    ) and "CC BY 3.0" in str(report)
    assert json.dumps(report.as_json())


def test_a_dry_run_of_one_case_has_its_image_and_mask(tmp_path):
    report = fetch("pancreas-ct", tmp_path, cases=["PANCREAS_0001"], dry_run=True)
    assert len(report.items) == 2 and report.summary().startswith("2 of 2")


def test_unknown_cases_and_cases_of_archives_are_refused(tmp_path):
    with pytest.raises(UseError):
        fetch("pancreas-ct", tmp_path, cases=["nobody"], dry_run=True)
    with pytest.raises(UseError, match="comes whole"):
        fetch("amos22", tmp_path, cases=["amos_0001"], dry_run=True)


@pytest.mark.parametrize("name", ["phantom-mammo", "msd-lung"])
def test_a_folder_that_holds_another_dataset_is_refused(offline, tmp_path, name):
    load_manifest("phantom-ct").save(tmp_path / "manifest.json")
    with pytest.raises(UseError, match="holds another dataset"):
        fetch(name, tmp_path, progress=False)
    assert fetch("phantom-ct", tmp_path, dry_run=True).skipped  # the one that is there


def test_a_smaller_phantom_does_not_pass_for_the_whole(tmp_path):
    man = load_manifest("phantom-ct")
    man.select([case.id for case in man.cases[:3]]).save(tmp_path / "manifest.json")
    assert fetch(man, tmp_path, dry_run=True).todo


def test_a_local_dataset_says_that_there_is_nothing_to_fetch(tmp_path):
    man = Manifest(name="mine", title="t", modality="CT", licence="-", citation="-", homepage="-",
                   source=Source(kind="local", notes="ask the data office"))  # fmt: skip
    with pytest.raises(UseError, match=r"no public source.*Ask the data office"):
        fetch(man, tmp_path)


# ---- the Imaging Data Commons, with its client replaced ----


class Client:
    """Writes files as idc-index would; says nothing when it fails, as idc-index does."""

    def __init__(self, lose=()):
        self.lose, self.calls = set(lose), []

    def download_from_selection(self, downloadDir, seriesInstanceUID, **settings):
        from pathlib import Path

        from smartlab.data.cohort import idc

        self.calls.append(list(seriesInstanceUID))
        assert settings["dirTemplate"] == "%SeriesInstanceUID"
        for uid, row in idc.lookup(seriesInstanceUID, ["instanceCount"]).items():
            folder = Path(downloadDir) / uid
            folder.mkdir(parents=True, exist_ok=True)
            for k in range(row["instanceCount"] - (1 if uid in self.lose else 0)):
                (folder / f"{k}.dcm").touch()


@pytest.fixture
def idc_client(monkeypatch):
    client = Client()
    monkeypatch.setattr(sources, "_idc_client", lambda: client)
    monkeypatch.setattr(download, "unreachable", lambda url, seconds=0: None)
    return client


def three(tmp_path):
    return [c.id for c in load_manifest("pancreas-ct").cases[:3]]


def test_series_arrive_in_folders_named_by_uid_where_cases_find_them(idc_client, tmp_path):
    man = load_manifest("pancreas-ct")
    report = fetch(man, tmp_path, cases=three(tmp_path), progress=False)
    assert report.ok and len(report.fetched) == 6
    assert all(case.locate(tmp_path).name == case.series_uid for case in man.cases[:3])
    assert fetch(man, tmp_path, cases=three(tmp_path), progress=False).fetched == []
    assert len(idc_client.calls) == 1


def test_a_series_that_arrived_in_part_is_reported_and_fetched_again(idc_client, tmp_path):
    lost = load_manifest("pancreas-ct").cases[1].series_uid
    idc_client.lose = {lost}
    report = fetch("pancreas-ct", tmp_path, cases=three(tmp_path), progress=False)
    assert list(report.failed) == [lost] and "files arrived" in report.failed[lost]
    assert len(report.fetched) == 5 and not (tmp_path / lost).exists()
    idc_client.lose = set()
    assert fetch("pancreas-ct", tmp_path, cases=three(tmp_path), progress=False).fetched == [lost]


def test_a_series_folder_that_lost_a_file_is_not_taken_for_complete(idc_client, tmp_path):
    fetch("pancreas-ct", tmp_path, cases=three(tmp_path), progress=False)
    uid = load_manifest("pancreas-ct").cases[0].series_uid
    next((tmp_path / uid).iterdir()).unlink()
    assert fetch("pancreas-ct", tmp_path, cases=three(tmp_path), progress=False).fetched == [uid]


def test_too_little_disk_is_said_before_anything_is_fetched(idc_client, monkeypatch, tmp_path):
    import shutil

    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(DataError, match=r"not enough disk space.*1\.0 MB free.*10\.2 GB"):
        fetch("pancreas-ct", tmp_path, progress=False)
    assert idc_client.calls == []


def test_the_real_client_takes_what_we_give_it():
    from idc_index import IDCClient

    known = inspect.signature(IDCClient.download_from_selection).parameters
    source = inspect.getsource(sources._fetch_series)
    for name in (
        "downloadDir",
        "seriesInstanceUID",
        "dirTemplate",
        "use_s5cmd_sync",
        "quiet",
        "show_progress_bar",
    ):
        assert name in known and f"{name}=" in source


def test_masks_given_as_paths_are_not_looked_for_in_the_index():
    from smartlab.data.cohort import idc

    case = Case(id="a", patient="p", series_uid="1.2", masks={"t": "t.nii.gz", "s": "series:1.3"})
    assert idc.series_of([case, case]) == ["1.2", "1.3"]
