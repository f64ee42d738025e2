"""A bundle on disk: opened, checked against its hashes, and asked for its files."""

from __future__ import annotations

import importlib.resources
import importlib.util
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from keepsight.runtime.manifest import LLMInfo, Manifest, read_manifest, sha256_of
from keepsight.runtime.tokenizer import TextTokenizer
from keepsight.streams import Source
from keepsight.streams.branches import Branch
from keepsight.streams.errors import BundleError, MissingModelError, UsageError
from keepsight.streams.timing import PipelineTiming

__all__ = ["SHIPPED", "Bundle"]

SHIPPED = {"tiny": "keepsight-tiny"}
"""Names of the bundles that come with the package -> their directory under `keepsight.runtime.bundles`."""


class Bundle:
    """A model, ready for a runtime: its manifest and its files.

    Attributes:
        path: directory of the bundle.
        manifest: what it says of itself.
        variant: the precision that its graphs are taken in.
    """

    def __init__(self, path: Path, manifest: Manifest, variant: str | None = None) -> None:
        """For :meth:`open`, which also checks."""
        self.path = path
        self.manifest = manifest
        self.variant = manifest.variants[0] if variant is None else variant

    def __repr__(self) -> str:
        return f"Bundle.open({str(self.path)!r})"

    @classmethod
    def open(cls, path_or_name: str | Path, *, variant: str | None = None, verify: bool = True) -> Bundle:
        """Open a bundle.

        Args:
            path_or_name: a directory, or the name of a shipped bundle (`tiny`). Write `./tiny` for a directory that
                is called like one.
            variant: a precision that the bundle comes in; its first one by default.
            verify: hash every file (about 1 ms a megabyte). Without it, only check that they are there.

        Raises:
            BundleError: no bundle there, an invalid manifest, or a file that is missing or not what was exported.
            UsageError: a variant that this bundle does not have.
        """
        path = _shipped(path_or_name) if str(path_or_name) in SHIPPED else Path(path_or_name)
        bundle = cls(path, read_manifest(path), variant)
        bundle._check_variant(bundle.variant)
        bundle._check_files(verify)
        return bundle

    def graph_path(self, name: str, variant: str | None = None) -> Path:
        """The .onnx file of a graph, in a variant or in the one that the bundle was opened in.

        Raises:
            UsageError: a graph or variant that this bundle does not have.
        """
        if name not in self.manifest.graphs:
            raise UsageError(
                f"bundle {self.manifest.name} has no graph {name!r}.", fix=f"It has {', '.join(self.manifest.graphs)}."
            )
        variant = self.variant if variant is None else variant
        self._check_variant(variant)
        return self.path / self.manifest.graphs[name].files[variant]

    def source(
        self,
        uri: str | Path,
        *,
        fps: float | None = None,
        realtime: bool = False,
        branches: Sequence[Branch] = (),
        timing: PipelineTiming | None = None,
    ) -> Source:
        """Open a source of frames as the vision graph takes them: scaled and sampled as the manifest says.

        Args:
            uri: what `Source` takes.
            fps: another rate than the manifest's.
            realtime: let a file play at its own speed, as a camera.
            branches: what hangs on the stream beside the frames.
            timing: times each frame's way through the pipeline.

        Raises:
            KeepsightError: what `Source` raises.
        """
        wanted = self.manifest.preprocessing
        return Source(
            uri,
            size=(wanted.width, wanted.height),
            aspect=wanted.aspect,
            scaler=wanted.scaler,
            colorimetry=wanted.colorimetry,
            fps=fps or self.manifest.sample_fps,
            pace="realtime" if realtime else "auto",
            branches=branches,
            timing=timing,
        )

    def precision(self, name: str) -> str:
        """What a graph computes in: fp32, fp16, int8 or fp8. A variant with vision in 8 bits has the other graphs of the first.

        Raises:
            UsageError: a graph that this bundle does not have.
        """
        file = self.graph_path(name)
        return next(variant for variant in self.manifest.variants if self.graph_path(name, variant) == file)

    @cached_property
    def tokenizer(self) -> TextTokenizer | None:
        """The Q-Former's tokenizer, loaded when first asked for; None for a Q-Former without text."""
        return None if self.manifest.tokenizer is None else TextTokenizer(self.path / self.manifest.tokenizer)

    @property
    def has_llm(self) -> bool:
        """Whether the bundle names a language model. Without one it ends at the soft prompt."""
        return self.manifest.llm is not None

    def llm_path(self, *, verify: bool = True) -> Path:
        """The GGUF file of the language model, wherever the manifest says it is.

        Args:
            verify: hash a file that lies outside the bundle (those inside are hashed when it is opened).

        Raises:
            MissingModelError: the file, or the package that it is in, is not installed.
            BundleError: the bundle names no language model, or the file is another one than it was exported with.
        """
        llm = self.manifest.llm
        if llm is None:
            raise BundleError(
                f"bundle {self.manifest.name} names no language model.", fix="It ends at the soft prompt."
            )
        path = self._llm_file(llm)
        if not path.is_file():
            raise MissingModelError(
                f"bundle {self.manifest.name} needs the language model {path.name}: {path} does not exist.",
                fix=_how_to_install(llm),
            )
        if verify and llm.place != "bundle" and sha256_of(path) != llm.sha256:
            raise BundleError(
                f"{path} is not the language model that bundle {self.manifest.name} was made with: its sha256 differs.",
                fix=_how_to_install(llm),
            )
        return path

    def _llm_file(self, llm: LLMInfo) -> Path:
        if llm.package is not None:
            return find_packaged(llm)
        return self.path / llm.file  # an absolute file stays as it is

    def _check_variant(self, variant: str) -> None:
        if variant not in self.manifest.variants:
            raise UsageError(
                f"bundle {self.manifest.name} has no variant {variant!r}.",
                fix=f"It has {', '.join(self.manifest.variants)}.",
            )

    def _check_files(self, verify: bool) -> None:
        listed = self.manifest.files
        unlisted = sorted(self.manifest.referenced_files() - listed.keys())
        if unlisted:
            raise BundleError(f"the manifest of {self.path} has no sha256 of {unlisted[0]}, which it refers to.")
        for name, sha256 in listed.items():
            file = self.path / name
            if not file.is_file():
                raise self._absent(name)
            if verify and sha256_of(file) != sha256:
                raise BundleError(
                    f"{file} is not what was exported: its sha256 differs from the manifest's.",
                    fix="The file is damaged or was changed: restore or export the bundle again.",
                )

    def _absent(self, name: str) -> BundleError:
        llm = self.manifest.llm
        if llm is not None and llm.place == "bundle" and llm.file == name:
            return MissingModelError(
                f"bundle {self.manifest.name} needs the language model {name}: {self.path / name} does not exist.",
                fix=_how_to_install(llm),
            )
        return BundleError(f"{self.path / name} is missing.", fix="Restore or export the bundle again.")


def find_packaged(llm: LLMInfo) -> Path:
    """Where a language model that an installed package carries lies. The package is found, never imported: it may need
    others, or do anything at all, when it is.

    Raises:
        MissingModelError: the package is not installed.
    """
    spec = None if llm.package is None else importlib.util.find_spec(llm.package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingModelError(
            f"the language model {llm.file} is in the package {llm.package}, which is not installed.",
            fix=_how_to_install(llm),
        )
    return Path(spec.submodule_search_locations[0]) / llm.file


def _shipped(name: str | Path) -> Path:
    directory = importlib.resources.files("keepsight.runtime.bundles") / SHIPPED[str(name)]
    return Path(str(directory))


def _how_to_install(llm: LLMInfo) -> str:
    if llm.package is None:
        return "Put the file there, or export the bundle again."
    return f'Install it with `pip install "{llm.install or llm.package}"`.'
