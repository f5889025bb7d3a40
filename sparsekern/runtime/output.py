"""The folder that a call fills with a model: held by that call alone, and loadable only once it is complete."""

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
MARKER = ".complete"  # in the staging folder, once everything is in it: says what is to be done with it
REPLACE, MOVE = b"replace", b"move"
CONFIG = "config.json"
OWN = (LOCK, STAGING, REMOVED)
NOTHING = (*OWN, "lost+found")  # of a folder that counts as empty: a fresh mount point has the latter
REPLACED = ("*.safetensors", "*.safetensors.index.json", "generation_config.json", "report.json", "report.html")


class OutputFolder:
    """A folder that this call holds the lock of.

    Files are written to a staging folder within and moved up once all of them are on disk, `config.json` last. So a folder with a
    `config.json` is whole, the folder itself is never replaced (it may be a mount point, or shared with a group), and what a killed
    call leaves is found and finished, or removed, by the next one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._staging = path / STAGING

    @classmethod
    @contextmanager
    def held(
        cls, path: str | os.PathLike, argument: str = "out", check: Callable[[Path, str], object] | None = None
    ) -> Iterator[OutputFolder]:
        """Hold the folder `path` within, made where it is missing and removed again where it stays empty.

        Args:
            path: the folder; `~` is expanded and links are resolved.
            argument: names `path` in messages.
            check: raises unless the folder may be written to, such as `check_output_folder` (the default). It is called with path
                and argument, before the folder is made and once it is held.

        Raises:
            FileExistsError: `path`, or a folder above it, is a file.
            ValueError: another call holds the folder; the path is not UTF-8.
            OSError: the folder cannot be made or written to.
        """
        path, check = checked_path(path, argument), check or check_output_folder
        if not (path / STAGING).exists():  # what a killed call began is finished before anything is said of the folder
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
        """Yield an empty folder, whose entries are moved into this one at the end; after an error they are removed.

        Args:
            replace: before that, remove the model that the folder holds: its weights, configs and reports. Other files stay.
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
        self._move_up()  # where this is interrupted, the next call finishes it
        self.clear()

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield an empty folder within this one, which is removed afterwards."""
        self.clear()
        self._staging.mkdir()
        try:
            yield self._staging
        finally:
            self.clear()

    def remove(self, name: str) -> None:
        """Remove an entry, which is gone at once: a call that is killed meanwhile leaves nothing under that name."""
        old = self.path / REMOVED
        shutil.rmtree(old, ignore_errors=True)
        os.replace(self.path / name, old)
        sync(self.path)
        shutil.rmtree(old, ignore_errors=True)

    def clear(self) -> None:
        """Remove the staging folder and whatever is in it."""
        for left in (self._staging, self.path / REMOVED):
            if left.exists():
                shutil.rmtree(left)

    def _recover(self) -> None:
        """Finish the moves of a call that was killed amid them; remove what is left of one that was killed before."""
        if (self._staging / MARKER).exists():
            self._move_up()
        self.clear()

    def _settle(self) -> None:
        """Give each staged file the mode of a new file, as the umask has it, and force it to disk."""
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
        marker = self._staging / MARKER
        if marker.read_bytes() == REPLACE:
            self._remove_model()
            write_atomically(marker, MOVE)
        for entry in sorted(self._staging.iterdir(), key=lambda entry: (entry.name == CONFIG, entry.name)):
            if entry.name != MARKER:
                _replace(entry, self.path / entry.name)
        sync(self.path)

    def _remove_model(self) -> None:
        (self.path / CONFIG).unlink(missing_ok=True)  # first: from now on nobody loads a mixture
        for pattern in REPLACED:
            for path in self.path.glob(pattern):
                path.unlink()


def check_output_folder(path: str | os.PathLike, argument: str = "out") -> None:
    """Raise `FileExistsError` unless `path` is new or an empty folder, and could be made.

    Args:
        path: the folder.
        argument: names `path` in messages.

    Raises:
        FileExistsError: `path`, or a folder above it, is a file; or it holds something.
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


def check_model_folder(path: str | os.PathLike, argument: str = "out") -> None:
    """Raise `FileExistsError` unless `path` is new, empty, or a folder with a model that a new one may replace.

    Args:
        path: the folder.
        argument: names `path` in messages.

    Raises:
        FileExistsError: `path` is a file, or a folder that holds something but no model, or an adapter or an unfinished run.
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
        TypeError: it is no path.
        ValueError: it is empty, or not UTF-8, which tokenizers cannot write to and a report cannot name.
        OSError: it is too long, or in a folder that may not be searched.
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
    except (ValueError, RuntimeError) as error:  # a null byte; a home that is not known
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
    """Make the folder and hold its lock; what was made is added to `made`, the innermost first."""
    for attempt in range(3):
        made[:0] = _make(path, argument)
        lock = locked(path / LOCK, f"{argument}: {path}")
        try:
            lock.__enter__()
            break
        except FileNotFoundError as error:  # the call that made the folder removed it again meanwhile
            if attempt == 2:
                raise OSError(error.errno, f"{argument}: {path} cannot be written to ({error.strerror})") from error
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def _make(path: Path, argument: str) -> list[Path]:
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
        except FileExistsError:  # another call was quicker
            continue
        except OSError as error:
            for parent in made:
                with suppress(OSError):
                    parent.rmdir()
            raise OSError(error.errno, f"{argument}: the folder {str(path)!r} cannot be made ({error.strerror})") from error
    return made


def _replace(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR, errno.ENOTDIR) or not target.is_dir():
            raise
        shutil.rmtree(target)  # a folder of an older tokenizer
        os.replace(source, target)
