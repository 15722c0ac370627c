"""Statements of a final answer in the text of a model: "Answer: X", "the answer is X", \\boxed{X}, <answer>X</answer>.

In: the text of an answer. Out: `Statement` objects in the order of the text. Knows nothing of the kinds of questions.
"""

# ruff: noqa: RUF001 (characters that models write)

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
THINKING = r"(?:think|thinking|thought|reasoning)"
ABBREVIATION = re.compile(r"(?:^|[\s(.])(?:St|Dr|Mr|Mrs|Ms|Mt|Ft|Jr|Sr|No|vs|approx|ca|etc|[A-Z])$")

# "answer" in the languages that models answer in, and other names of a choice.
NOUN = (
    r"(?:answers?|antwort|lösung|respuesta|réponse|risposta|resposta|antwoord|odpowiedź|svar|ответ|відповідь|cevap|"
    r"yanıt|jawaban|đáp án|câu trả lời|정답|답|答案|答え|正解|解答|回答|"
    r"الإجابة|الجواب|उत्तर|正确选项|"
    r"(?:correct|right|best|final|my|selected|chosen)\s+(?:choice|option))"
)
# Words after the noun that change nothing: "answer choice", "respuesta correcta", "the right option here".
FILLER = (
    r"(?:\s+(?:corr\w+|richtig\w*|final\w*|choice|option|letter|here|then|therefore|thus|clearly|đúng|الصحيحة)){0,2}"
)
OF_WHAT = r"(?:\s+(?:to|for|of)\s[^.:;?\n]{1,60}?)?"
COLON = r"[ \t]*[\"*_`)\]]{0,4}[ \t]*(?:(?P<colon>[:=→]|->)|[—–-](?=\s))"
MODAL = r"(?:(?:must|should|would|will|has to|have to|can only|seems to|appears to|deve|muss|doit)\s+)?"
ADVERB = r"(?:(?:therefore|thus|then|clearly|indeed|simply|most likely|probably)\s+)?"
VERB = (
    rf"(?:\s+{MODAL}{ADVERB}"
    r"(?:is|are|be|ist|lautet|sein|es|est|être|è|é|jest|är|adalah|là|هي|هو)\b|\s*[是为為选選は은는])"
)
CUE = re.compile(rf"(?<![A-Za-zÀ-ɏЀ-ӿ])(?:{NOUN}){FILLER}{OF_WHAT}(?:{COLON}|{VERB})[ \t]*:?", re.IGNORECASE)
# A line with nothing but "Answer" or "Final answer", such as a heading.
HEADING = re.compile(rf"^[#*_ \t]*(?:(?:the|my|final|correct)\s+)*{NOUN}[*_ \t]*$", re.IGNORECASE | re.MULTILINE)
# What may stand before "Answer:" in its line, so that the statement has the form that the prompt asks for.
FORMAL = re.compile(
    r"^[\s#*_>`\"\-•✅|]*(?:(?:the|my|so|thus|therefore|hence|final|correct|right|best|die|la|richtige)[\s,]+)*$",
    re.IGNORECASE,
)
# What makes a statement a thought about an answer: "if the answer is B", "one might think the answer is B".
HYPOTHETICAL = re.compile(
    r"\b(?:if|suppose|assum\w+|whether|unless|why|(?:might|may|could|would) think|thought|form|format)\b"
    r"[^.!?\n]{0,25}$|"
    r"\b(?:with|write|say)\b[^.!?\n]{0,20}[\"'“`]$",
    re.IGNORECASE,
)
TAG = re.compile(r"<(answer|final_answer)>(.*?)(?:</\1>|\Z)", re.IGNORECASE | re.DOTALL)
JSON_FIELD = re.compile(
    r"\"(?:final_?)?(?:answer|choice)\"\s*:\s*(?:\"((?:[^\"\\]|\\.)*)\"|([^\"\s,}\]]+))", re.IGNORECASE
)
HASHES = re.compile(r"^####[ \t]*([-−]?[$€£]?[\d.,/]+)\s*\Z", re.MULTILINE)  # as in the solutions of GSM8K
BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
# What takes a statement back if no other follows.
RETRACTION = re.compile(
    r"(?:^|[.!?…\n]\s*)(?:oh,?\s+|but\s+|hmm\W+)*(?:wait\b|hold on\b|hmm\b|scratch that|on second thought|no, |"
    r"actually, (?:no|that|the|i)\b|correction\b|let me (?:redo|recalculate|recompute|reconsider|correct|fix))|"
    r"\bi made an? (?:mistake|error)",
    re.IGNORECASE,
)
WRAPPER = re.compile(r"\\(?:text\w*|math\w+|operatorname|boxed|fbox|mbox|emph)\s*\{([^{}]*)\}")
MARKUP = re.compile(r"(?<![\w)])(?:\*{2,3}|__)|(?:\*{2,3}|__)(?![\w(])|`|\\[()\[\]]|(?<!\\)\$|\\[,;!]")
LONGEST = 1000  # characters of a statement; longer ones are prose or a repetition
QUOTES = "\"'“”‘’«»„「」『』"
ARTICLE = re.compile(r"^(?:the|an|a)\s+(?=\S)")


@dataclass(frozen=True)
class Statement:
    """A statement of an answer. `formal`: it has the form of a final answer, and is not prose such as "the answer is".

    `start` is its position in the text, and `payload` the rest of the line or the content of the markup.
    """

    start: int
    payload: str
    formal: bool


def without_reasoning(text: str) -> str | None:
    """The text after the reasoning in <think> tags. None if the reasoning has no end: the answer was truncated."""
    rest = re.split(rf"</{THINKING}>", text, flags=re.IGNORECASE)[-1]
    return None if re.search(rf"<{THINKING}>", rest, re.IGNORECASE) else rest


def normalised(text: str) -> str:
    """Unicode normal form KC. Superscripts become ^{2}, and vulgar fractions 1/2."""
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻]+", lambda found: f"^{{{found[0].translate(SUPERSCRIPTS)}}}", text)
    text = re.sub("(?<=\\d)(?=[¼-¾⅐-⅞])", " ", text)
    return unicodedata.normalize("NFKC", text).replace("\u2044", "/")


def plain(text: str) -> str:
    """A text without Markdown, LaTeX wrappers, surrounding quotes and white space."""
    previous = None
    while previous != text:
        previous, text = text, WRAPPER.sub(r"\1", text)
    return MARKUP.sub("", text).strip().strip(QUOTES).strip("* \t\n").strip(QUOTES)


def comparable(text: str) -> str:
    """A text in lower case and Unicode normal form, without markup, a final full stop and a leading English article."""
    text = plain(normalised(text)).casefold().replace("’", "'").replace("–", "-")
    return ARTICLE.sub("", " ".join(text.split()).rstrip(".。!").strip())


def first_sentence(text: str) -> str:
    """A text up to its first full stop that ends a sentence, without the full stop."""
    for found in re.finditer(r"[.!?。](?=\s|$)|。", text):
        if not ABBREVIATION.search(text[: found.start()]):
            return text[: found.start()]
    return text


def statements(text: str) -> list[Statement]:
    """The statements of an answer in a normalised text without reasoning, in the order of the text."""
    fields = list(JSON_FIELD.finditer(text))
    found = [one for one in _cues(text) if not any(field.start() < one.start < field.end() for field in fields)]
    found += _boxes(text)
    found += [Statement(one.end(), _following(text, one.end()), True) for one in HEADING.finditer(text)]
    found += [Statement(one.start(2), one[2].strip()[:LONGEST], True) for one in TAG.finditer(text)]
    found += [Statement(one.start(), (one[1] or one[2] or "")[:LONGEST], True) for one in fields]
    found += [Statement(one.start(), one[1], True) for one in HASHES.finditer(text)]
    return sorted(found, key=lambda one: one.start)


def lines_of(text: str) -> list[str]:
    """The lines of a text that are not empty."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def retracted(text: str, last: Statement) -> bool:
    """Whether the text after the last statement takes it back."""
    return RETRACTION.search(text, last.start) is not None


def _cues(text: str) -> Iterator[Statement]:
    for found in CUE.finditer(text):
        before = text[text.rfind("\n", 0, found.start()) + 1 : found.start()]
        if not HYPOTHETICAL.search(before):
            formal = found["colon"] is not None and FORMAL.match(before) is not None
            yield Statement(found.start(), _following(text, found.end()), formal)


def _following(text: str, position: int) -> str:
    """The rest of the line, or the next line that is not empty if the rest has no letter and no digit."""
    for line in text[position:].split("\n", 4)[:4]:
        if re.search(r"\w", line):
            return line.strip()[:LONGEST]
    return ""


def _boxes(text: str) -> Iterator[Statement]:
    """The content of \\boxed. Several in one line are one statement with all of them."""
    line, contents, start = -1, list[str](), 0
    for found in BOXED.finditer(text):
        this = text.count("\n", 0, found.start())
        if contents and this != line:
            yield Statement(start, _joined(contents), True)
            contents = []
        line, start = this, found.start()
        contents.append(_balanced(text, found.end()))
    if contents:
        yield Statement(start, _joined(contents), True)


def _joined(contents: list[str]) -> str:
    return " or ".join(dict.fromkeys(contents))


def _balanced(text: str, position: int) -> str:
    """The text up to the brace that closes the group; empty if there is none or if it is far away."""
    depth = 1
    for found in re.compile(r"[{}]").finditer(text, position, position + LONGEST):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return text[position : found.start()]
    return ""
