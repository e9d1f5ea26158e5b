"""What the MiniLM example reads: sentences of its own, and the paragraphs of the README."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path


# Of a paragraph or a sentence, in characters: less has nothing to be found by.
MIN_LENGTH = 40
README = Path(__file__).resolve().parents[1] / "README.md"

# Pairs that mean about the same, for the table that people look at.
SHOWN = (
    "The cat sleeps on the warm windowsill.",
    "A kitten is napping in the sun by the window.",
    "The central bank raised interest rates.",
    "Borrowing money has become more expensive.",
    "How do I reset my password?",
    "I cannot log in because I forgot my secret code.",
)

# (who, does what, to or with what, where, why)
TOPICS = (
    ("a gardener", "waters", "the tomatoes", "behind the house", "it has not rained for a month"),
    ("the surgeon", "examines", "the broken wrist", "in the clinic", "the patient fell on ice"),
    ("a programmer", "rewrites", "the parser", "in Rust", "the old one was too slow"),
    ("the orchestra", "rehearses", "Mahler's fifth symphony", "in Vienna", "the season opens soon"),
    ("an astronomer", "photographs", "a distant galaxy", "in Chile", "its light is redshifted"),
    ("the goalkeeper", "saves", "the penalty", "at Wembley", "she guessed the right corner"),
    ("a lawyer", "challenges", "the contract", "before the court", "one clause is unfair"),
    ("the baker", "kneads", "the sourdough", "at four in the morning", "the shop opens at six"),
    ("a geologist", "collects", "volcanic rocks", "on Iceland", "they record the magnetic field"),
    ("the investor", "sells", "government bonds", "in Frankfurt", "yields are rising again"),
    ("a teacher", "explains", "long division", "to the fourth grade", "the test is on Friday"),
    ("the mechanic", "replaces", "the gearbox", "of an old tractor", "third gear was grinding"),
    ("a beekeeper", "moves", "forty hives", "into the clover fields", "the lime trees have faded"),
    ("the pilot", "diverts", "the flight", "to Reykjavik", "a passenger fell ill"),
    ("a chemist", "titrates", "the acid", "under the fume hood", "the label was unreadable"),
    ("the mayor", "opens", "the new tram line", "at the station", "the roads were jammed"),
    ("a poet", "recites", "her sonnets", "in a crowded cellar", "the prize was announced"),
    ("the network engineer", "blocks", "the port", "on the firewall", "packets were leaking"),
)

FRAMES = (
    "{Who} {does} {what} {where}.",
    "Why does {who} handle {what} {where}?",
    "{does} {what}",
    "BREAKING: {WHAT} {WHERE}!!!",
    "It is not true that {who} {does} {what}; nobody does so {where}.",
    '"Tell me," she wrote, "who else {does} {what} {where}, and when?"',
    "{Because}, and therefore {who} {does} {what} {where}, as was agreed in clause 4.2 (2019).",
    "todo: {what}, {where}, 3 times, $12.50 each -- {because}",
    "Last year things were different. {Who} seldom came {where}, and {what} had to wait. This "
    "year {because}, so {who} {does} {what} every day, sometimes twice.",
    "Notes on {what}. First, {who} {does} it {where}. Second, {because}. Third, what was planned "
    "for the spring was put off until autumn, because the money, the people and the weather all "
    "failed at once; the committee met five times, wrote two reports of some ninety pages, and "
    "recommended in the end what everybody had proposed in the beginning. Fourth, whoever asks "
    "about {what} should be shown the figures of the last ten years and not only of the best one.",
)

ODD = (
    "E = mc^2",
    "for i in range(10):\n    print(i * i)",
    "SELECT name, age FROM users WHERE age > 30 ORDER BY name;",
    "https://example.com/a/b?c=1&d=2#e",
    "Die Katze schläft auf dem warmen Fensterbrett.",
    "Le café naïf de l'été coûte 4,50 €.",
    "El perro de mi vecino ladra toda la noche.",
    "今日は天気がいいですね。",
    "Привет, как дела?",
    "🙂🚀 so happy!!!",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "the the the the the the the the the the the the the the the the the the the the the the the",
    "To be, or not to be, that is the question.",
    "lol idk maybe tmrw??",
    "WHAT DO YOU MEAN, NO REFUNDS?!",
    "(555) 014-2673 ext. 89",
    "Il treno per Firenze parte dal binario sette.",
    "Mix 200 g of flour, 3 eggs and a pinch of salt; rest for an hour.",
    "The the horse raced past the barn fell",
    # Longer than the encoder's 256 tokens, so it is cut.
    " ".join(f"Item {i} of the list weighs {i * 37 % 101} grams." for i in range(60)),
)


# Too short to be sentences: of fewer than 5 tokens.
FRAGMENTS = ("", "Yes.", "?!", "a", "42")


def sentences() -> list[str]:
    """200 texts of 3 to some 700 words: 18 topics in 10 forms, and 20 odd ones."""
    made = []
    for who, does, what, where, why in TOPICS:
        words = {"who": who, "does": does, "what": what, "where": where, "because": why}
        words |= {name.capitalize(): _capital(word) for name, word in words.items()}
        words |= {"WHAT": what.upper(), "WHERE": where.upper()}
        made += [frame.format(**words) for frame in FRAMES]
    return [*made, *ODD]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """A small search task: which paragraph does a query belong to?

    Attributes:
        documents: the paragraphs.
        queries: their sentences, one by one, and the headings.
        answers: for each query the numbers of the documents that are right: the paragraph that
            holds it, or all under the heading.
    """

    documents: list[str]
    queries: list[str]
    answers: list[frozenset[int]]


def retrieval(markdown: str) -> Retrieval:
    """Make the task of a Markdown text: prose and list items, no code, no tables."""
    task = Retrieval([], [], [])
    headings: dict[str, list[int]] = {}
    under: list[int] = []
    for block in _blocks(markdown):
        if block.startswith("#"):
            under = headings.setdefault(_plain(block.lstrip("# ")), [])
            continue
        number = len(task.documents)
        under.append(number)
        task.documents.append(_plain(block))
        for sentence in re.split(r"(?<=[.?!:;])\s+", block):
            # Of a paragraph of one sentence it would be the whole; of a few words, anybody's.
            if MIN_LENGTH <= len(sentence) < len(block):
                task.queries.append(_plain(sentence))
                task.answers.append(frozenset([number]))
    for heading, numbers in headings.items():
        if numbers:
            task.queries.append(heading)
            task.answers.append(frozenset(numbers))
    return task


def _blocks(markdown: str) -> list[str]:
    """Headings, paragraphs and list items in their order."""
    without_code = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    pieces = re.split(r"\n\s*\n|\n(?=[-*] |#+ )|(?<=\n)(?=#+ )", without_code)
    blocks = [re.sub(r"\s+", " ", piece).strip() for piece in pieces]
    return [b for b in blocks if b[:1] == "#" or (len(b) >= MIN_LENGTH and b[0] != "|")]


def _plain(block: str) -> str:
    """Without the marks of Markdown: list dashes, emphasis, code quotes, link targets."""
    block = re.sub(r"^[-*] ", "", block)
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", block).replace("**", "").replace("`", "").strip()
