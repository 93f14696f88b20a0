"""Names of classes: their order, how those of two sets meet, and what is told of a data set.

A label is a number, and means nothing without the names that it counts. Wherever labels cross from
one set to another they are matched by name, here.
"""

import difflib
import re
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np

from tokgen import interfaces
from tokgen.data import imagenet

# Of classes that nobody chose: all of so many, or some of them evenly over all
FEW, SOME = 16, 8
LISTED = 8  # names that a line of text holds
_WHOLE = re.compile(r"[0-9]+")
_LONGEST = 40  # characters of a name in a file's name or a line of text


def ordered(names: Sequence[str]) -> list[str]:
    """The names in order; as integers where all of them are: 2 comes before 10."""
    if numbered(names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def numbered(names: Sequence[str]) -> bool:
    """Whether all names are whole numbers."""
    return bool(names) and all(_WHOLE.fullmatch(name) for name in names)


def counted(names: Sequence[str]) -> bool:
    """Whether the names are 0, 1, 2, ...: numbers in the place of names."""
    return bool(names) and tuple(names) == tuple(map(str, range(len(names))))


def folded(name: str) -> str:
    """A name without what systems change of it: its case, and how accents are written."""
    return unicodedata.normalize("NFC", name).casefold()


def spoken(name: str) -> str:
    """A name as it may be typed: in any case, and with -, _ or spaces between its words."""
    return " ".join(re.split(r"[\s_-]+", folded(name))).strip()


def of_imagenet(names: Sequence[str]) -> bool:
    """Whether the names are ImageNet's thousand, as words or as wnids, in the order of labels."""
    return tuple(names) in (imagenet.NAMES, imagenet.SYNSETS)


def translated(found: Sequence[str], known: Sequence[str]) -> list[str] | None:
    """ImageNet's classes found, in the words of those known; None where one side has others.

    One side has names where the other has wnids, as class folders and TFDS have.
    """
    for table in (imagenet.NAME_OF, imagenet.SYNSET_OF):
        words = [table.get(name) for name in found]
        if words and set(words) <= set(known):
            return words
    return None


def common(old: Sequence[str], new: Sequence[str]) -> tuple[list[int], list[int]]:
    """(numbers in `old`, numbers in `new`) of the classes that both have, in the order of `new`.

    By name as it may be typed, ImageNet's also by wnid; by the very name where that is not unique.
    """
    keys = [[spoken(imagenet.NAME_OF.get(name, name)) for name in names] for names in (old, new)]
    if any(len(set(names)) < len(names) for names in keys):
        keys = [old, new]
    number = {name: n for n, name in enumerate(keys[0])}
    pairs = [(number[name], n) for n, name in enumerate(keys[1]) if name in number]
    return [there for there, _ in pairs], [here for _, here in pairs]


def recorded(names: Sequence[str], order: Sequence[str]) -> tuple[str, ...]:
    """The names in a recorded order, if that is one of the same names; else as they are."""
    return tuple(order if sorted(order) == sorted(names) else names)


def matched(
    found: Sequence[str], known: Sequence[str], what: str, whose: str
) -> tuple[np.ndarray, str]:
    """(the number among `known` of each class found, what is to be said of it).

    By name; if need be by the same name in other case, or ImageNet's by wnid. Numbers stand for
    names where one side has nothing else and both agree in how many there are. Anything else is an
    error: `what` has the classes found, and `whose` those that are known.
    """
    if not known:  # whoever knows no classes reads no labels
        said = f"{whose} has no classes: those of {what} are not used" if found else ""
        return np.zeros(max(len(found), 1), np.int32), said
    number = {name: label for label, name in enumerate(known)}
    if found and set(found) <= set(number):
        return np.array([number[name] for name in found], np.int32), ""
    alike = {}
    for name in known:
        alike.setdefault(folded(name), []).append(name)
    near = [alike.get(folded(name), ()) for name in found]
    if found and all(len(names) == 1 for names in near):
        label_C = np.array([number[names[0]] for names in near], np.int32)
        if len(set(label_C.tolist())) == len(found):
            changed = [
                f"{shown(name)} as {shown(names[0])}"
                for name, names in zip(found, near, strict=True)
                if name != names[0]
            ]
            return label_C, f"classes of {what} are read in other case: {listed(changed)}"
    if words := translated(found, known):
        return np.array([number[name] for name in words], np.int32), (
            f"classes of {what} are ImageNet's: {found[0]} is read as {words[0]}"
        )
    same = len(found) == len(known)
    if same and counted(known) and not numbered(found):
        return np.arange(len(found), dtype=np.int32), (
            f"the classes of {whose} are numbers: those of {what} are taken in their order, "
            f"{shown(found[0])} as 0 to {shown(found[-1])} as {len(found) - 1}"
        )
    if same and counted(found) and not numbered(known):
        return np.arange(len(found), dtype=np.int32), (
            f"the classes of {what} are numbers: they are taken as those of {whose}, 0 as "
            f"{shown(known[0])} to {len(found) - 1} as {shown(known[-1])}"
        )
    unknown = [name for name in found if name not in number]
    absent = [name for name in known if name not in set(found)]
    raise interfaces.UserError(
        f"the classes of {what} must be among those of {whose}; "
        + (
            f"found {listed(unknown)}, and {whose} has {listed(absent or known)} besides"
            if found
            else f"found images without classes, and {whose} has {listed(known)}"
        )
        + "; rename or remove them, or give a set with these classes"
    )


def labels_of(text: str, classes: Sequence[str]) -> list[int]:
    """Labels that a text asks for: names, numbers or ranges (`0-9`), comma between, or `all`.

    Without any: all where they are few, else some evenly over them. Where the names are numbers
    themselves, numbers and ranges are of names. A name may be in other case, have - or _ for its
    spaces, or be the wnid of a class of ImageNet's.
    """
    count = max(len(classes), 1)
    if not text and count > FEW:
        return [n * count // SOME for n in range(SOME)]
    if not text or (text.strip() == "all" and "all" not in classes):
        return list(range(count))
    label_of = {number: number for number in range(count)}
    if numbered(classes):
        label_of = {int(name): label for label, name in enumerate(classes)}
    labels = []
    for part in text.split(","):
        part = part.strip()
        span = re.fullmatch(r"(-?[0-9]{1,18})(?:-([0-9]{1,18}))?", part)
        if part in classes:
            labels.append(list(classes).index(part))
        elif span:
            low = int(span[1])
            high = low if span[2] is None else int(span[2])
            if not low <= high <= low + count or not all(
                number in label_of for number in range(low, high + 1)
            ):
                ids = f"{min(label_of)} to {max(label_of)}"
                if len(label_of) <= max(label_of) - min(label_of):
                    ids = f"among {ids}"
                named = f" ({', '.join(classes[:10])}{' ...' if count > 10 else ''})"
                raise interfaces.UserError(
                    f"class ids are {ids}{named if classes else ''}; found {part}"
                )
            labels.extend(label_of[number] for number in range(low, high + 1))
        else:
            labels.append(_label_of(part, classes))
    return labels


def chosen(
    wanted: str | int | Sequence[str | int] | np.ndarray, classes: Sequence[str]
) -> list[int]:
    """Labels that a library user asks for: a text as of `labels_of`, a label, or a list of these.

    In a list a text that is a name is that name, whatever it holds; a number is a label, the place
    of its name, also where the names are numbers.
    """
    if isinstance(wanted, str):
        return [list(classes).index(wanted)] if wanted in classes else labels_of(wanted, classes)
    if hasattr(wanted, "__array__"):
        wanted = np.asarray(wanted).tolist()
    labels = []
    for part in wanted if isinstance(wanted, list | tuple | range) else (wanted,):
        if isinstance(part, str) and part.strip():
            labels += chosen(part, classes)
        elif isinstance(part, int | np.integer) and not isinstance(part, bool):
            if not 0 <= part < max(len(classes), 1):
                named = f" ({listed(classes)})" if classes else ", the model is unconditional"
                raise interfaces.UserError(
                    f"labels are 0 to {max(len(classes), 1) - 1}{named}; found {part}"
                )
            labels.append(int(part))
        else:
            raise interfaces.UserError(
                "classes must be a text of names, numbers or ranges (`0-9,cat`), a label, or a "
                f"list of names and labels; found {part!r:.100}"
            )
    if not labels:
        raise interfaces.UserError("classes must name at least one class; found an empty list")
    return labels


def _label_of(text: str, classes: Sequence[str]) -> int:
    """The label of a name that is not spelled as it is known, or an error with the nearest."""
    words = translated([text], classes) or [text]
    alike = [n for n, name in enumerate(classes) if spoken(name) == spoken(words[0])]
    if len(alike) == 1:
        return alike[0]
    if alike:
        raise interfaces.UserError(
            f"class {text!r} may be any of {', '.join(classes[n] for n in alike)}: "
            "write it as it is known, or give its number"
        )
    known = f"names: {listed(classes, 20)}" if classes else "none, the model is unconditional"
    raise interfaces.UserError(
        f"unknown class {text!r}{_hint(text, classes)}; need ids 0 to {max(len(classes), 1) - 1} "
        f"or {known}"
    )


def _hint(text: str, classes: Sequence[str]) -> str:
    """`; did you mean giant panda or lesser panda?`: names with that word, or written nearly so."""
    text = spoken(text)
    known = {spoken(name): name for name in classes}
    # a word inside a name is nearer than its letters are: "panda" is no typo of "paddle"
    near = [name for name in known if f" {text} " in f" {name} "] if text else []
    near = near or difflib.get_close_matches(text, known, 3)
    names = [shown(known[name]) for name in near[:4]]
    return f"; did you mean {' or '.join(names)}?" if names else ""


def shown(name: str) -> str:
    """A name that any terminal can print, shortened."""
    name = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in name)
    name = name.encode("utf-8", "backslashreplace").decode()
    return name if len(name) <= _LONGEST else name[: _LONGEST - 3] + "..."


def listed(names: Sequence[str], most: int = LISTED) -> str:
    """`cat, dog ... (998 more)`"""
    names = list(names)
    text = ", ".join(shown(name) for name in names[:most])
    return f"{text} ... ({len(names) - most} more)" if len(names) > most else text


def file_name(label: int, names: Sequence[str]) -> str:
    """`class3-cat`: number and name, as a part of a file's name on any system."""
    number = f"class{label}"
    if not 0 <= label < len(names) or names[label] == str(label):
        return number
    # the number tells names apart that become equal here
    name = re.sub(r"[^\w.+-]+", "_", names[label]).strip("._")
    # 255 bytes is what file systems allow, and a letter may take four
    name = name.encode("utf-8", "ignore")[:_LONGEST].decode("utf-8", "ignore")
    return f"{number}-{name}" if name else number


def told(what: str, sources: Mapping[str, object]) -> str:
    """The classes and counts of each split, and what the sources have to say, in a few lines.

    `sources` are by split, as `train` and `held_out`. A source may have `counts`, images by class,
    `unread`, files that were passed over by where they lie and how they end, and `notes`; one
    around another source has that as `inner`.
    """
    names = next((tuple(s.classes) for s in sources.values()), ())
    counts = [source.counts for source in sources.values()]
    if not names:
        kinds = "no classes"
    else:
        labels = names
        if all(count is not None for count in counts):
            count_C = np.sum(counts, axis=0)
            labels = [f"{shown(name)} {n}" for name, n in zip(names, count_C, strict=True)]
        kinds = f"{len(names)} class{'es' * (len(names) > 1)} ({listed(labels)})"
    parts = ", ".join(f"{split.replace('_', ' ')} {len(s)}" for split, s in sources.items())
    lines = [f"{what}: {kinds}; {parts}"]
    for split, count_C in zip(sources, counts, strict=True):
        if names and count_C is not None and len(sources[split]):
            none = [name for name, n in zip(names, count_C, strict=True) if n == 0]
            if none:
                lines.append(
                    f"{split.replace('_', ' ')} has no image of {len(none)} "
                    f"class{'es' * (len(none) > 1)}: {listed(none, 4)}"
                )
    if "held_out" in sources and not len(sources["held_out"]):
        lines.append("nothing is held out: there are no held-out metrics")
    for source in sources.values():
        lines += source.notes
    unread = {}
    for source in sources.values():
        unread |= source.unread
    endings = {}
    for found in unread.values():
        for ending, number in found.items():
            endings[ending] = endings.get(ending, 0) + number
    if endings:
        lines.append(f"{unread_files(endings)}")
    return "\n".join(dict.fromkeys(lines))


def unread_files(endings: Mapping[str, int]) -> str:
    """`12 files were not read: 10 .heic, 2 .txt`"""
    total = sum(endings.values())
    most = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
    text = listed([f"{number} {ending}" for ending, number in most])
    return f"{total} file{'s were' if total > 1 else ' was'} not read: {text}"
