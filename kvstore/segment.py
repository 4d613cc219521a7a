"""One shared-memory file of fixed-size slots, mapped by the store and by every replica of a node.

The file is a page of header, then the tables (see `tables`), then, from a page boundary on,
`num_slots * slot_bytes` of data; replicas copy between their device and the slots directly. What
the tables mean is not known here.

Every process that maps a segment holds a shared `flock` on it for exactly as long as the mapping
exists, however the process ends. So "no lock" means "no user", and a file left behind by a killed
process can be told from a live one without knowing pids or trusting names. The standard library's
`multiprocessing.shared_memory` is not used: before Python 3.13 a process that merely attached
unlinks the memory of all the others when it dies.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenflow.kvstore.process import start_ticks
from tokenflow.kvstore.sizing import free_bytes
from tokenflow.kvstore.tables import Tables
from tokenflow.replicas.errors import KVStoreError

if TYPE_CHECKING:
    import torch

SHM_DIRECTORY = "/dev/shm"
FILE_PREFIX = "tokenflow-kv-"
TABLES_OFFSET = 4096

_MAGIC = b"TFKVSEG\0"
_VERSION = 3
_HEADER = struct.Struct("<IIQQQQQQ")  # follows the magic
_MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module has no name for it
_CREATE_ATTEMPTS = 10
_NO_ROOM = (errno.ENOSPC, errno.ENOMEM, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Header:
    """The first page of a segment, little-endian, right behind the 8 bytes of magic."""

    max_owners: int
    slot_bytes: int
    num_slots: int
    data_offset: int
    """First byte of slot 0, on a page boundary, so that the driver can pin the data area."""
    creator_pid: int
    creator_start_ticks: int
    """With the pid, names the creating process (see `process`); for people who look into a file."""
    epoch: int
    """Differs between any two segments of a node; a lease is valid for one epoch only."""

    @property
    def file_bytes(self) -> int:
        return self.data_offset + self.slot_bytes * self.num_slots

    def write(self, buffer: mmap.mmap) -> None:
        """The magic goes last: a file without it is still being made, or never was finished."""
        _HEADER.pack_into(
            buffer,
            len(_MAGIC),
            _VERSION,
            self.max_owners,
            self.slot_bytes,
            self.num_slots,
            self.data_offset,
            self.creator_pid,
            self.creator_start_ticks,
            self.epoch,
        )
        buffer[: len(_MAGIC)] = _MAGIC

    @classmethod
    def parse(cls, page: bytes, path: str) -> Header:
        if len(page) < len(_MAGIC) + _HEADER.size or page[: len(_MAGIC)] != _MAGIC:
            raise KVStoreError(f"{path} is not a finished KV segment: its first bytes are wrong")
        version, *fields = _HEADER.unpack_from(page, len(_MAGIC))
        if version != _VERSION:
            raise KVStoreError(
                f"{path} has KV segment version {version}, this build reads version {_VERSION}; "
                "run the same tokenflow version in every process of a node"
            )
        return cls(*fields)


class Segment:
    """A mapped segment. Made by `create` (the store) or `attach` (replicas); not thread-safe."""

    def __init__(self, path: str, header: Header, mapping: mmap.mmap) -> None:
        self.path = path
        self.header = header
        self._mapping: mmap.mmap | None = mapping

    @classmethod
    def create(
        cls,
        name: str,
        *,
        slot_bytes: int,
        num_slots: int,
        epoch: int,
        max_owners: int = 32,
        directory: str = SHM_DIRECTORY,
    ) -> Segment:
        """Make `tokenflow-kv-<name>` with all its memory allocated (zeros), and map it.

        About 0.25 s per GiB. Raises KVStoreError when the name is taken or memory is short: the
        file is then gone again. Allocating now turns a later SIGBUS into an error at the start.
        """
        if slot_bytes <= 0 or num_slots <= 0:
            raise KVStoreError(
                f"a KV segment needs at least one slot of one byte, got {num_slots} slots of "
                f"{slot_bytes} bytes; raise kvstore.host_kv_gib (--host-kv-gib)"
            )
        path = os.path.join(directory, FILE_PREFIX + name)
        pid = os.getpid()
        tables_end = TABLES_OFFSET + Tables.nbytes(num_slots, max_owners)
        header = Header(
            max_owners=max_owners,
            slot_bytes=slot_bytes,
            num_slots=num_slots,
            data_offset=-(-tables_end // mmap.PAGESIZE) * mmap.PAGESIZE,
            creator_pid=pid,
            creator_start_ticks=start_ticks(pid) or 0,
            epoch=epoch,
        )
        fd = _create_locked(path)
        try:
            os.posix_fallocate(fd, 0, header.file_bytes)
            # From here on the mapping's own duplicate of the descriptor carries the lock.
            mapping = mmap.mmap(fd, header.file_bytes)
        except OSError as error:
            os.unlink(path)
            if error.errno in _NO_ROOM:
                raise _no_room(directory, header.file_bytes) from error
            raise KVStoreError(f"cannot allocate the KV segment {path}: {error}") from error
        finally:
            os.close(fd)
        header.write(mapping)
        return cls(path, header, mapping)

    @classmethod
    def attach(cls, path: str, *, slot_bytes: int | None = None, prefault: bool = True) -> Segment:
        """Map an existing segment for reading and writing.

        With `slot_bytes` given, a segment with slots of another size is refused. `prefault` makes
        the kernel enter every page now, where it can, so that the first copies meet no page
        faults. Raises KVStoreError if the file is missing, unfinished, about to be reaped, or of
        another version.
        """
        try:
            fd = os.open(path, os.O_RDWR)
        except OSError as error:
            raise KVStoreError(
                f"cannot open the KV segment {path}: {error.strerror}; the store that made it has "
                "stopped, or this process does not share its /dev/shm"
            ) from error
        locked = False
        try:
            # The reaper holds the lock exclusively while it unlinks; after that no name is left.
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                locked = True
            if not locked or not _is_linked(fd, path):
                raise KVStoreError(f"the KV segment {path} is being removed; its store is gone")
            header = Header.parse(os.pread(fd, TABLES_OFFSET, 0), path)
            if os.fstat(fd).st_size != header.file_bytes:
                raise KVStoreError(f"the KV segment {path} is truncated; restart its store")
            if slot_bytes is not None and slot_bytes != header.slot_bytes:
                raise KVStoreError(
                    f"the KV segment {path} has slots of {header.slot_bytes} bytes, this replica "
                    f"needs {slot_bytes}; serve one model, block size and dtype per node, or "
                    "switch the host tier off with kvstore.host_kv_gib: 0 (--host-kv-gib 0)"
                )
            mapping = mmap.mmap(fd, header.file_bytes)
        finally:
            os.close(fd)
        if prefault:
            _prefault(mapping, path)
        return cls(path, header, mapping)

    def tables(self) -> Tables:
        """The tables; like a tensor they stay valid after `close`."""
        header = self.header
        return Tables(
            self._open_mapping(), header.num_slots, header.max_owners, offset=TABLES_OFFSET
        )

    def tensor(self) -> torch.Tensor:
        """All slots as one zero-copy tensor, torch.uint8 `[num_slots, slot_bytes]`, contiguous.

        It stays valid after `close`: the memory goes back when the last such tensor does.
        """
        import torch  # the store's own process maps the file too, and never needs torch

        # Through a memoryview: torch lets go of the buffer at once but keeps the object, and only
        # a live view stops the mapping from being closed underneath the tensor.
        view = memoryview(self._open_mapping())
        header = self.header
        flat = torch.frombuffer(
            view,
            dtype=torch.uint8,
            offset=header.data_offset,
            count=header.num_slots * header.slot_bytes,
        )
        return flat.view(header.num_slots, header.slot_bytes)

    def memory(self) -> memoryview:
        """The data area, all slots one after the other, u8; like a tensor it outlives `close`."""
        return memoryview(self._open_mapping())[self.header.data_offset :]

    def close(self) -> None:
        """Drop this object's mapping and its lock; both live on while a tensor or table does."""
        if self._mapping is None:
            return
        # A live view exports the buffer; the mapping is then freed together with the view.
        with contextlib.suppress(BufferError):
            self._mapping.close()
        self._mapping = None

    def unlink(self) -> None:
        """Remove the name. Processes that have the segment mapped keep their memory."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def _open_mapping(self) -> mmap.mmap:
        if self._mapping is None:
            raise KVStoreError(f"the KV segment {self.path} was closed by this process")
        return self._mapping


def reap_orphans(directory: str = SHM_DIRECTORY, prefix: str = FILE_PREFIX) -> list[str]:
    """Unlink the segments that no process maps any more, and return their paths.

    Safe beside stores that are starting and beside other reapers: a file goes only while this
    process holds its lock exclusively, which nobody who maps it, or is making it, would allow.
    """
    reaped: list[str] = []
    for path in segment_files(directory, prefix):
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            continue  # gone meanwhile, or another user's
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_linked(fd, path):
                os.unlink(path)
                reaped.append(path)
        except OSError:
            continue  # in use
        finally:
            os.close(fd)
    return reaped


def segment_files(directory: str, prefix: str) -> list[str]:
    """Paths of the regular files in `directory` whose name begins with `prefix`, sorted."""
    with os.scandir(directory) as entries:
        return sorted(
            entry.path
            for entry in entries
            if entry.name.startswith(prefix) and entry.is_file(follow_symlinks=False)
        )


def segment_bytes(directory: str = SHM_DIRECTORY, prefix: str = FILE_PREFIX) -> int:
    """Bytes of all segment files with this prefix, in use or not."""
    total = 0
    for path in segment_files(directory, prefix):
        with contextlib.suppress(FileNotFoundError):
            total += os.stat(path).st_size
    return total


def _create_locked(path: str) -> int:
    """A new file at `path`, locked; between making and locking it a reaper may take it away."""
    for _ in range(_CREATE_ATTEMPTS):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise KVStoreError(f"cannot create the KV segment {path}: {error.strerror}") from error
        fcntl.flock(fd, fcntl.LOCK_SH)  # a reaper holds it for one unlink at most
        if _is_linked(fd, path):
            return fd
        os.close(fd)
    raise KVStoreError(f"the KV segment {path} was removed {_CREATE_ATTEMPTS} times while starting")


def _prefault(mapping: mmap.mmap, path: str) -> None:
    try:
        mapping.madvise(_MADV_POPULATE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:  # an older kernel; pages then come in at their first use
            raise KVStoreError(f"cannot map the KV segment {path}: {error.strerror}") from error


def _is_linked(fd: int, path: str) -> bool:
    """True if `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _no_room(directory: str, asked: int) -> KVStoreError:
    return KVStoreError(
        f"no room for the KV segment: asked for {asked / 2**30:.2f} GiB, {directory} has "
        f"{free_bytes(directory) / 2**30:.2f} GiB free. Lower kvstore.host_kv_gib "
        f"(--host-kv-gib), or give the container a larger {directory}: `docker run --shm-size` for "
        "/dev/shm, in Kubernetes an emptyDir volume with medium: Memory and a sizeLimit "
        "(kvStore.size in the chart; it counts against the container's memory limit)"
    )
