"""Output folders: held by one call at a time, and loadable only once they are complete."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .._files import locked, sync, write_atomically

LOCK = ".sparsekern.lock"
STAGING = ".sparsekern.tmp"
REMOVED = ".sparsekern.old"
MARKER = ".complete"  # in a complete staging folder: holds the step that comes next
REPLACE, MOVE = b"replace", b"move"
CONFIG = "config.json"
OWN = (LOCK, STAGING, REMOVED)
NOTHING = (*OWN, "lost+found")  # entries of a folder that counts as empty; a fresh mount point has the last
REPLACED = ("*.safetensors", "*.safetensors.index.json", "generation_config.json", "report.json", "report.html")


class OutputFolder:
    """An output folder whose lock this call holds.

    Files are written to a staging folder inside it and moved up once all are on disk, `config.json` last. So a folder with a
    `config.json` is complete. The folder itself is never replaced, since it may be a mount point or shared with a group. The next call
    finishes the moves of a killed one, or removes its files.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._staging = path / STAGING

    @classmethod
    @contextmanager
    def held(
        cls, path: str | os.PathLike, argument: str = "out", check: Callable[[Path, str], object] | None = None
    ) -> Iterator[OutputFolder]:
        """Hold the folder `path` inside the block. It is made if missing, and removed again if it stays empty.

        Args:
            path: the folder; `~` is expanded and links are resolved.
            argument: name of `path` in messages.
            check: raises unless the folder may be written to. The default is `check_output_folder`. It is called with path and
                argument, before the folder is made and again once it is held.

        Raises:
            FileExistsError: `path` or a folder above it is a file.
            ValueError: another call holds the folder, or the path is not UTF-8.
            OSError: the folder cannot be made or written to.
        """
        path, check = checked_path(path, argument), check or check_output_folder
        if not (path / STAGING).exists():  # the moves of a killed call are finished before the folder is checked
            check(path, argument)
        made: list[Path] = []
        try:
            with _locked(path, argument, made):
                folder = cls(path)
                folder._recover()
                check(path, argument)
                yield folder
        finally:
            for parent in made:
                with suppress(OSError):  # it holds something
                    parent.rmdir()

    @contextmanager
    def staged(self, *, replace: bool = False) -> Iterator[Path]:
        """Yield an empty folder whose entries are moved into this one at the end. After an error they are removed.

        Args:
            replace: first remove the model in this folder: its weights, configs and reports. Other files stay.
        """
        self.clear()
        self._staging.mkdir()
        try:
            yield self._staging
            self._settle()
            write_atomically(self._staging / MARKER, REPLACE if replace else MOVE)
        except BaseException:
            shutil.rmtree(self._staging, ignore_errors=True)
            raise
        self._move_up()  # if this is interrupted, the next call finishes it
        self.clear()

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield an empty folder inside this one that is removed afterwards."""
        self.clear()
        self._staging.mkdir()
        try:
            yield self._staging
        finally:
            self.clear()

    def remove(self, name: str) -> None:
        """Remove an entry by renaming it first, so that a killed call leaves nothing under that name."""
        old = self.path / REMOVED
        shutil.rmtree(old, ignore_errors=True)
        os.replace(self.path / name, old)
        sync(self.path)
        shutil.rmtree(old, ignore_errors=True)

    def clear(self) -> None:
        """Remove the staging folder with its content."""
        for left in (self._staging, self.path / REMOVED):
            if left.exists():
                shutil.rmtree(left)

    def _recover(self) -> None:
        """Finish the moves of a killed call, or remove the files of one that was killed before its moves."""
        if (self._staging / MARKER).exists():
            self._move_up()
        self.clear()

    def _settle(self) -> None:
        """Give each staged file the mode that the umask gives new files, and force it to disk."""
        probe = self._staging / MARKER
        probe.touch()
        mode = probe.stat().st_mode & 0o777
        probe.unlink()
        for folder, _, files in os.walk(self._staging):
            for name in files:
                path = Path(folder, name)
                path.chmod(mode)  # safetensors makes private files
                sync(path)
            sync(Path(folder))

    def _move_up(self) -> None:
        """Move the staged entries into the folder, `config.json` last."""
        marker = self._staging / MARKER
        if marker.read_bytes() == REPLACE:
            self._remove_model()
            write_atomically(marker, MOVE)
        for entry in sorted(self._staging.iterdir(), key=lambda entry: (entry.name == CONFIG, entry.name)):
            if entry.name != MARKER:
                _replace(entry, self.path / entry.name)
        sync(self.path)

    def _remove_model(self) -> None:
        (self.path / CONFIG).unlink(missing_ok=True)  # first, so that nobody loads a mixture
        for pattern in REPLACED:
            for path in self.path.glob(pattern):
                if not path.is_dir():
                    path.unlink()


def check_output_folder(path: str | os.PathLike, argument: str = "out") -> None:
    """Raise `FileExistsError` unless `path` is a new or empty folder.

    Args:
        path: the folder.
        argument: name of `path` in messages.

    Raises:
        FileExistsError: `path` or a folder above it is a file, or the folder is not empty.
        ValueError: the path is not UTF-8.
    """
    path = checked_path(path, argument)
    for file in (path, *path.parents):
        if file.exists() and not file.is_dir():
            raise FileExistsError(f"{argument}: {str(file)!r} is a file, expected a folder")
    held = sorted(entry.name for entry in path.iterdir() if entry.name not in NOTHING) if path.exists() else []
    if held:
        shown = ", ".join(held[:3]) + (", …" if len(held) > 3 else "")
        raise FileExistsError(
            f"{argument}: the folder {str(path)!r} already holds something else ({shown}); name a new or empty one"
        )


def check_not_a_model(path: str | os.PathLike, argument: str = "path") -> None:
    """Raise `FileExistsError` unless `path` is a new or empty folder; say of a model how to replace it.

    Args:
        path: the folder.
        argument: name of `path` in messages.

    Raises:
        FileExistsError: see `check_output_folder`.
        ValueError: the path is not UTF-8.
    """
    try:
        check_output_folder(path, argument)
    except FileExistsError as error:
        if not (checked_path(path, argument) / CONFIG).is_file():
            raise
        raise FileExistsError(f"{error}, or pass overwrite=True to replace the model in it") from error


def check_model_folder(path: str | os.PathLike, argument: str = "out") -> None:
    """Raise `FileExistsError` unless `path` is a new or empty folder, or holds a model that may be replaced.

    Args:
        path: the folder.
        argument: name of `path` in messages.

    Raises:
        FileExistsError: `path` is a file, or a folder with an adapter, an unfinished run, or other content without a model.
        ValueError: the path is not UTF-8.
    """
    path = checked_path(path, argument)
    for name, what in (("adapter_config.json", "an adapter"), ("checkpoint", "an unfinished run")):
        if (path / name).exists():
            raise FileExistsError(f"{argument}: the folder {str(path)!r} holds {what} ({name}), which is not overwritten")
    if not (path / CONFIG).is_file():
        check_output_folder(path, argument)


def checked_path(path: str | os.PathLike, argument: str) -> Path:
    """Return `path` with `~` expanded and links resolved.

    Raises:
        TypeError: `path` is not a path.
        ValueError: `path` is empty, or not UTF-8, which tokenizers and reports need.
        OSError: `path` is too long, or in a folder that may not be searched.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{argument}: expected the path of a folder, got {path!r}")
    if not os.fspath(path):
        raise ValueError(f"{argument}: expected the path of a folder, got an empty one")
    try:
        found = Path(path).expanduser().resolve()
        str(found).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{argument}: expected a path in UTF-8, got {os.fsencode(path)!r}") from error
    except (ValueError, RuntimeError) as error:  # a null byte, or an unknown home folder
        raise ValueError(f"{argument}: expected the path of a folder, got {str(path)!r} ({error})") from error
    try:
        found.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise OSError(error.errno, f"{argument}: {str(path)!r} cannot be a folder ({error.strerror})") from error
    return found


@contextmanager
def _locked(path: Path, argument: str, made: list[Path]) -> Iterator[None]:
    """Make the folder and hold its lock. New folders are added to `made`, the innermost first."""
    for attempt in range(3):
        made[:0] = _make(path, argument)
        lock = locked(path / LOCK, f"{argument}: {path}")
        try:
            lock.__enter__()
            break
        except FileNotFoundError as error:  # the call that made the folder has removed it again
            if attempt == 2:
                raise OSError(error.errno, f"{argument}: {path} cannot be written to ({error.strerror})") from error
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def _make(path: Path, argument: str) -> list[Path]:
    """Make a folder with its parents and return the new ones, the innermost first."""
    missing = []
    for folder in (path, *path.parents):
        if folder.is_dir():
            break
        if folder.exists():
            raise FileExistsError(f"{argument}: {str(folder)!r} is a file, expected a folder")
        missing.append(folder)
    made: list[Path] = []
    for folder in reversed(missing):
        try:
            folder.mkdir()
            made.insert(0, folder)
        except FileExistsError:  # another call made it first
            continue
        except OSError as error:
            for parent in made:
                with suppress(OSError):
                    parent.rmdir()
            raise OSError(error.errno, f"{argument}: the folder {str(path)!r} cannot be made ({error.strerror})") from error
    return made


def _replace(source: Path, target: Path) -> None:
    """Rename a file or folder, replacing a folder of the same name."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR, errno.ENOTDIR) or not target.is_dir():
            raise
        shutil.rmtree(target)  # such as the folder of an older tokenizer
        os.replace(source, target)
