"""From a manifest to jobs: which files and labels, under which salted keys.

The only place where ids and paths of a cohort meet the keys they are stored under.
"""

from __future__ import annotations

import os
from pathlib import Path

from smartlab.core.errors import SmartlabError, UseError
from smartlab.data.cohort.case import uid_in
from smartlab.data.cohort.files import Files
from smartlab.data.cohort.manifest import ImageGroup, Manifest
from smartlab.data.cohort.privacy import hashed, scrub
from smartlab.data.store.request import Failure, FlatSettings, Job, Outline, Settings

OUTLINE = "lesion"  # name of the outline of a lesion among the masks of a mammogram's case


class Cohort:
    """The images of a manifest below a root, as jobs for `ingest`."""

    def __init__(
        self, man: Manifest, root: Path, out: Path, settings: Settings | FlatSettings, salt: bytes
    ) -> None:
        self.root, self.out, self.settings, self.salt = root, out, settings, salt
        self.groups = man.images()
        self.keys = [hashed(salt, "image", group.key) for group in self.groups]
        self.case_keys = {case.id: hashed(salt, "case", case.id) for case in man.cases}
        self.flat, self.phantom = man.modality == "MG", man.source.kind == "phantom"
        self.organs = tuple(sorted(man.organs))
        self.values = label_values(man) if settings.labels else {}
        self.files = Files(man, root, self.values)

    def job(self, number: int) -> Job | Failure:
        """What to do for image `number`, or why it cannot be done."""
        group, key = self.groups[number], self.keys[number]
        words = identifying(group, self.root)
        try:
            path, series, files = self.files.image(group)
            stored = self.settings.labels and not self.flat
            drawn = [case for case in group.cases if case.masks and self.flat]
            value = self.values.get(OUTLINE, 1)
            return Job(
                key=key,
                path=path,
                series=series,
                out=self.out,
                settings=self.settings,
                salt=self.salt,
                files=files,
                lesions=tuple((self.case_keys[c.id], c.lesion) for c in group.cases if c.lesion),
                labels=tuple(self.files.labels(group)) if stored else (),
                organs=self.organs,
                words=words,
                channels=self.files.channels(group),
                outlines=tuple(Outline(self.case_keys[c.id], value, self.files.outline(c)) for c in drawn),
                phantom=self.phantom,
            )
        except (
            Exception
        ) as error:  # a link that leads to itself, a folder that may not be read: only this image's
            text = str(error) if isinstance(error, SmartlabError) else f"{type(error).__name__}: {error}"
            return Failure(key, None, scrub(text, words, instead="<image>"))


def label_values(man: Manifest) -> dict[str, int]:
    """Name -> value in the stored label volumes: the organs' own values, then masks by name."""
    if man.modality == "MG":  # whatever else a case names, such as a cut-out, is no label
        return {OUTLINE: 1} if any(case.masks for case in man.cases) else {}
    values = {name: value for value, name in man.organs.items()}
    names = sorted({name for case in man.cases for name in case.masks} - set(values))
    free = [v for v in range(1, 256) if v not in man.organs]
    if any(not 0 < v < 256 for v in man.organs) or len(names) > len(free):
        raise UseError(
            "label values do not fit one byte",
            path=f"manifest {man.name}",
            found=f"{len(values)} organs up to {max(values.values(), default=0)}, {len(names)} masks",
            expected="at most 255 structures with values 1 to 255",
            fix="split the manifest, or build with labels=False",
        )
    return values | dict(zip(names, free, strict=False))


def identifying(group: ImageGroup, root: Path) -> tuple[str, ...]:
    """What identifies the cases of an image, as it may turn up in an error."""
    words = {str(root), str(root.resolve()), os.path.expanduser("~")}
    for case in group.cases:
        given = [case.image, *case.channels.values(), case.label_map, *case.masks.values()]
        places = [uid_in(place) or place for place in given if place]
        words |= {case.id, case.patient, case.series_uid or "", *places}
        words |= {part for place in places for part in Path(place).parts}
        words |= {str(root / place) for place in places}
    return tuple(sorted(words - {""}))
