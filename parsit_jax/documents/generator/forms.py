"""Forms that somebody filled in: labelled fields, boxes to tick; four layout families and one held out."""

from parsit_jax.documents.generator import values
from parsit_jax.documents.generator.composition import Composition
from parsit_jax.documents.generator.document import Question, Split
from parsit_jax.documents.generator.entries import Entry, Family, Line, compose
from parsit_jax.documents.generator.page import Row, left, right, row
from parsit_jax.documents.generator.values import Source

LABELS = {
    "name": ("Name", "Full name", "Applicant"),
    "birth_date": ("Born", "Birth date", "Born on"),
    "number": ("Card no", "Member", "ID", "File"),
    "town": ("Town", "City", "Place"),
    "phone": ("Phone", "Tel", "Call"),
    "fee": ("Fee", "Amount", "Paid"),
    "employer": ("Firm", "Employer", "Works at"),
}

QUESTIONS = {
    "name": "What is the name?",
    "birth_date": "What is the date of birth?",
    "number": "What is the card number?",
    "town": "What is the town?",
    "phone": "What is the phone number?",
    "fee": "What is the fee?",
    "employer": "Who is the employer?",
}

TITLES = (
    "Membership",
    "REGISTRATION",
    "Application",
    "Claim form",
    "VISITOR FORM",
    "Order form",
    "Entry form",
)

_ORDERS = (("head", "fields", "boxes"), ("head", "fields", "boxes"), ("head", "boxes", "fields"))

FAMILIES = {
    "ledger": Family(_ORDERS),
    "colon": Family(_ORDERS, style="colon"),
    "ruled": Family(_ORDERS, ruled=True, border=True),
    "stacked": Family(_ORDERS, stacked=("fields",), rules=0.5),
    "captioned": Family(_ORDERS, stacked=("fields",), value_first=True, split=Split.HELD_OUT),
}

LAYOUTS = {name: (family.split,) for name, family in FAMILIES.items()}


def _boxes(source: Source) -> tuple[list[Row], str]:
    """Two or three boxes, one of them ticked, two to a row; and what the ticked one says."""
    options = values.items(source, source.integer(2, 3))
    ticked = source.pick(options)
    texts = [f"[{'x' if option == ticked else ' '}] {option}" for option in options]
    pairs = [texts[start : start + 2] for start in range(0, len(texts), 2)]
    return [row(left(pair[0]), *(right(text) for text in pair[1:])) for pair in pairs], ticked


def compose_form(source: Source, layout: str, font: str, height: int, width: int) -> Composition | None:
    """Draws a form; None where it does not fit the page."""
    answers = {
        "name": values.person(source),
        "birth_date": values.date_style(source)(values.day(source)),
        "number": values.number(source),
        "town": values.place(source),
        "phone": values.phone(source),
        "fee": values.money_style(source)(values.cents(source)),
        "employer": values.company(source),
    }
    chosen = source.rng.permutation(list(answers))[: source.integer(4, 5)]
    case = str.upper if source.chance(0.2) else str
    rows, ticked = _boxes(source)
    sections: dict[str, list[Line]] = {
        "head": [source.pick(TITLES)],
        "fields": [Entry(case(source.pick(LABELS[name])), answers[name], name) for name in map(str, chosen)],
        "boxes": [*rows],
    }
    made = compose(source, FAMILIES[layout], sections, QUESTIONS, font, height, width)
    if made is None:
        return None
    question = Question("Which box is ticked?", ticked, "ticked")
    return Composition(made.page, (*made.questions, question), {**made.fields, "ticked": ticked})
