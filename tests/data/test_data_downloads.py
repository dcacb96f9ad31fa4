"""Downloads come whole and right or not at all, and nothing is overwritten; the server is this process."""

import hashlib
import http.server
import itertools
import os
import socketserver
import threading
from pathlib import Path

import pytest
from official_data import CIFAR10_FOLDER, pack, write_cifar10, write_mnist

from lightning_easgd.lab.data import CIFAR10DataModule, DataError, FashionMNISTDataModule
from lightning_easgd.lab.data.cifar import CIFARFiles
from lightning_easgd.lab.data.official_files import OfficialFile, fetch

pytestmark = pytest.mark.timeout(60)


class Site(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`; a path in `server.cut` ends early, one in `server.silent` states no length."""

    def do_GET(self):
        name = self.path.strip("/")
        self.server.requests.append(name)
        if name not in self.server.files:
            self.send_error(404)
            return
        content = self.server.files[name]
        self.send_response(200)
        if name not in self.server.silent:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if name in self.server.cut else content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def site():
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Site) as server:
        server.daemon_threads = True
        server.files, server.cut, server.silent, server.requests = {}, set(), set(), []
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_a_file_arrives_whole(site, tmp_path, size, silent):
    site.files["a.bin"] = os.urandom(size)
    site.silent = {"a.bin"} if silent else set()
    file = OfficialFile(tmp_path / "new" / "folder" / "a.bin", md5(site.files["a.bin"]))
    fetch(f"{site.url}/a.bin", file, verify=True)
    assert file.path.read_bytes() == site.files["a.bin"]
    assert names(file.path.parent) == ["a.bin"]
    umask = os.umask(0)
    os.umask(umask)
    assert file.path.stat().st_mode & 0o777 == 0o666 & ~umask  # others may read it


def test_a_file_that_exists_is_neither_fetched_nor_changed(site, tmp_path):
    (tmp_path / "a.bin").write_bytes(b"mine")
    fetch(f"{site.url}/a.bin", OfficialFile(tmp_path / "a.bin", md5(b"theirs")), verify=True)
    assert (tmp_path / "a.bin").read_bytes() == b"mine"
    assert site.requests == []


def test_a_file_that_appears_meanwhile_is_not_replaced(site, tmp_path, monkeypatch):
    site.files["a.bin"] = b"theirs"
    link = os.link

    def late(source, target):
        Path(target).write_bytes(b"mine")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    fetch(f"{site.url}/a.bin", OfficialFile(tmp_path / "a.bin", None), verify=True)
    assert (tmp_path / "a.bin").read_bytes() == b"mine"
    assert names(tmp_path) == ["a.bin"]


def test_a_file_system_without_hard_links_will_do(site, tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError("no hard links here")

    site.files["a.bin"] = b"theirs"
    monkeypatch.setattr(os, "link", refuse)
    fetch(f"{site.url}/a.bin", OfficialFile(tmp_path / "a.bin", None), verify=True)
    assert (tmp_path / "a.bin").read_bytes() == b"theirs"
    assert names(tmp_path) == ["a.bin"]


def test_a_wrong_checksum_keeps_nothing_unless_switched_off(site, tmp_path):
    site.files["a.bin"] = b"changed"
    file = OfficialFile(tmp_path / "a.bin", md5(b"original"))
    with pytest.raises(DataError, match=r"a\.bin has the MD5 sum .* nothing was kept, or set verify=false"):
        fetch(f"{site.url}/a.bin", file, verify=True)
    assert names(tmp_path) == []
    fetch(f"{site.url}/a.bin", file, verify=False)
    assert file.path.read_bytes() == b"changed"


def test_an_early_end_keeps_nothing(site, tmp_path):
    site.files["a.bin"] = bytes(1000)
    site.cut = {"a.bin"}
    with pytest.raises(DataError, match=r"a\.bin: the download (stopped after 500 of 1000 bytes|failed)"):
        fetch(f"{site.url}/a.bin", OfficialFile(tmp_path / "a.bin", None), verify=False)
    assert names(tmp_path) == []


@pytest.mark.parametrize("url", ["{site}/missing", "http://127.0.0.1:1/a", "no-url"])
def test_a_failure_is_one_sentence(site, tmp_path, url):
    with pytest.raises(DataError, match=r"the download failed \(.+\); try again, or put the file there yourself"):
        fetch(url.format(site=site.url), OfficialFile(tmp_path / "a", None), verify=False)
    assert names(tmp_path) == []


def published(monkeypatch, module, archive: bytes):
    """Lets a data module take the hand-made archive for the official one."""
    monkeypatch.setattr(module.source, "archive", OfficialFile(module.source.archive.path, md5(archive)))
    return module


def test_cifar_downloads_its_archive_once(site, tmp_path, monkeypatch):
    write_cifar10(tmp_path / "made")
    pack(tmp_path / "made" / CIFAR10_FOLDER, tmp_path / "made.tar.gz")
    archive = (tmp_path / "made.tar.gz").read_bytes()
    site.files["cifar-10-python.tar.gz"] = archive
    root = tmp_path / "root"
    for _ in range(2):
        module = published(monkeypatch, CIFAR10DataModule(root=root, download=True, url=site.url), archive)
        module.prepare_data()
        module.setup("fit")
        assert len(module.train_dataloader().dataset) == 90
    assert site.requests == ["cifar-10-python.tar.gz"]
    assert names(root) == ["cifar-10-python.tar.gz"]  # read where it is: nothing is unpacked


def test_cifar_from_a_mirror_needs_the_switch(site, tmp_path):
    write_cifar10(tmp_path / "made")
    pack(tmp_path / "made" / CIFAR10_FOLDER, tmp_path / "made.tar.gz")
    site.files["cifar-10-python.tar.gz"] = (tmp_path / "made.tar.gz").read_bytes()
    arguments = {"root": tmp_path / "root", "download": True, "url": site.url}
    with pytest.raises(DataError, match="verify=false"):
        CIFAR10DataModule(**arguments).prepare_data()
    assert names(tmp_path / "root") == []
    with pytest.warns(UserWarning, match="verify=False"):
        CIFAR10DataModule(**arguments, verify=False).prepare_data()
    assert names(tmp_path / "root") == ["cifar-10-python.tar.gz"]


def test_nothing_is_downloaded_unasked_or_beside_a_folder(site, tmp_path):
    write_cifar10(tmp_path)
    with pytest.raises(DataError, match="MD5"):
        CIFAR10DataModule(root=tmp_path, download=True, url=site.url).prepare_data()
    with pytest.raises(DataError, match="download=true"):
        CIFAR10DataModule(root=tmp_path / "empty", url=site.url).prepare_data()
    assert site.requests == []


def test_fashion_mnist_downloads_what_is_missing(site, tmp_path):
    write_mnist(tmp_path / "made", compressed=True)
    write_mnist(tmp_path / "root")
    made, raw = (tmp_path / part / "FashionMNIST" / "raw" for part in ("made", "root"))
    (raw / "t10k-labels-idx1-ubyte").unlink()
    site.files = {path.name: path.read_bytes() for path in made.iterdir()}
    arguments = {"root": tmp_path / "root", "download": True, "url": site.url + "/"}
    with pytest.raises(DataError, match="MD5"):
        FashionMNISTDataModule(**arguments).prepare_data()
    with pytest.warns(UserWarning, match="verify=False"):
        FashionMNISTDataModule(**arguments, verify=False).prepare_data()
    assert set(site.requests) == {"t10k-labels-idx1-ubyte.gz"}
    module = FashionMNISTDataModule(root=tmp_path / "root")
    module.setup("test")
    assert len(module.test_dataloader().dataset) == 40


def test_processes_that_download_at_once_all_end_with_the_file(site, tmp_path):
    content = os.urandom(200_000)
    site.files["a.bin"] = content
    file = OfficialFile(tmp_path / "a.bin", md5(content))
    errors = []

    def attempt():
        try:
            fetch(f"{site.url}/a.bin", file, verify=True)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=attempt) for _ in range(6)]
    for step, thread in itertools.product(("start", "join"), threads):
        getattr(thread, step)()
    assert errors == []
    assert file.path.read_bytes() == content
    assert names(tmp_path) == ["a.bin"]


def test_official_addresses():
    module = CIFAR10DataModule()
    assert isinstance(module.source, CIFARFiles)
    assert module.source.url == "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    assert FashionMNISTDataModule().source.url == "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
