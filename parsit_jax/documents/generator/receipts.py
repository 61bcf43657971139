"""Receipts: shop, date, number, items, sums, payment; six layout families and one held out. Slips: in any order."""

from dataclasses import dataclass

from parsit_jax.documents.generator import values
from parsit_jax.documents.generator.composition import Composition
from parsit_jax.documents.generator.document import Split
from parsit_jax.documents.generator.entries import Entry, Family, Line, compose
from parsit_jax.documents.generator.values import Source

LABELS = {
    "date": ("Date", "DATE", "Date", "Issued"),
    "number": ("No.", "Receipt", "Bill no", "Ticket", "Ref", "RECEIPT NO"),
    "subtotal": ("Subtotal", "SUB TOTAL", "Net", "Goods"),
    "tax": ("Tax", "VAT", "GST", "Sales tax", "TAX"),
    "total": ("TOTAL", "Total", "Total due", "AMOUNT DUE", "Balance due", "To pay", "Grand total"),
    "cash": ("Cash", "CASH", "Cash paid", "Tendered"),
    "change": ("Change", "CHANGE", "Change due"),
}

# Amounts that nobody asks for, so that neither the last nor the largest amount must be the total.
DISTRACTORS = ("Old balance", "You saved", "Voucher left", "Deposit", "Gift card", "Last visit")

HEADINGS = ("RECEIPT", "Cash receipt", "Welcome", "SALE", "Customer copy")
CLOSINGS = ("Thank you!", "Come again", "THANK YOU", "Please keep", "Goods sold")

QUESTIONS = {
    "shop": "What is the shop name?",
    "date": "What is the date?",
    "number": "What is the receipt number?",
    "item": "What is the price of {label}?",
    "subtotal": "What is the subtotal?",
    "tax": "What is the tax?",
    "total": "What is the total?",
    "cash": "How much cash was paid?",
    "change": "What is the change?",
}

# In training, no sum ever stands above an item.
_ORDERS = (
    ("head", "meta", "items", "sums", "tail"),
    ("head", "meta", "items", "sums", "tail"),
    ("head", "items", "sums", "meta", "tail"),
)
_HELD_OUT_ORDERS = (("head", "sums", "items", "meta", "tail"), ("head", "sums", "meta", "items", "tail"))

FAMILIES = {
    "ledger": Family(_ORDERS),
    "centred": Family(_ORDERS, style="centred", alignments=(0.5,)),
    "colon": Family(_ORDERS, style="colon", alignments=(0.0,)),
    "boxed": Family(_ORDERS, alignments=(0.5,), rules=1.0, border=True),
    "tabbed": Family(_ORDERS, style="tabbed"),
    "columns": Family(_ORDERS, rules=0.5, stacked=("meta", "sums")),
    "totals_first": Family(_HELD_OUT_ORDERS, rules=0.5, split=Split.HELD_OUT),
}

LAYOUTS = {name: (family.split,) for name, family in FAMILIES.items()}

# Slips hold what receipts hold in no order at all, so that a label is found by its words and not by its place.
_SLIP_ORDERS = (("head", "entries", "tail"), ("entries", "head", "tail"))
SLIP_FAMILIES = {
    "ledger": Family(_SLIP_ORDERS),
    "colon": Family(_SLIP_ORDERS, style="colon"),
    "centred": Family(_SLIP_ORDERS, style="centred"),
    "tabbed": Family(_SLIP_ORDERS, style="tabbed", split=Split.HELD_OUT),
}
SLIP_LAYOUTS = {name: (family.split,) for name, family in SLIP_FAMILIES.items()}


@dataclass(frozen=True)
class _Amounts:
    sums: dict[str, int]
    prices: list[int]


def _draw_amounts(source: Source, count: int) -> _Amounts | None:
    """Sums by name, and prices of `count` items, that add up; None where this total allows none."""
    total = values.cents(source, 500)
    sums, goods = {"total": total}, total
    if count == 1 or source.chance(0.5):
        parts = values.cents_pair(source, total, max(20, total // 25))
        if parts is None:
            return None
        sums["tax"], goods = sorted(parts)
        if count > 1 and source.chance(0.5):  # the subtotal of one item would be its price once more
            sums["subtotal"] = goods
    if source.chance(0.5) or len(sums) + count < 3:
        change = values.cents_beyond(source, total, 100, max(200, total // 2))
        if change is None:
            return None
        sums["cash"], sums["change"] = total + change, change
    prices = values.cents_parts(source, goods, count)
    return _Amounts(sums, prices) if prices else None


def _draw_sections(source: Source) -> dict[str, list[Line]]:
    """Random content: 6 to 9 lines, at least 3 amounts, no value printed twice."""
    while True:
        count = source.pick((1, 2, 2, 3, 3))
        amounts = _draw_amounts(source, count)
        if amounts is None:
            continue
        money, date = values.money_style(source), values.date_style(source)
        case = str.upper if source.chance(0.3) else str
        label = {name: case(source.pick(options)) for name, options in LABELS.items()}
        meta = [
            Entry(label["date"], date(values.day(source)), "date"),
            Entry(label["number"], values.number(source), "number"),
        ]
        goods = zip(values.items(source, count), amounts.prices, strict=True)
        items = [Entry(case(name), money(price), "item") for name, price in goods]
        sums = [Entry(label[name], money(amounts.sums[name]), name) for name in label if name in amounts.sums]
        if source.chance(0.3):
            distractor = Entry(case(source.pick(DISTRACTORS)), money(values.cents(source)))
            sums.insert(source.pick((0, len(sums))), distractor)
        printed = [entry.value for entry in (*meta, *items, *sums)]
        heading = [case(source.pick(HEADINGS))] if source.chance(0.25) else []
        tail = [source.pick(CLOSINGS)] if source.chance(0.2) else []
        lines = 1 + len(heading) + len(printed) + len(tail)
        if not 6 <= lines <= 9 or len(set(printed)) < len(printed):
            continue
        shop = Entry("", (str.upper if source.chance(0.4) else str)(values.company(source)), "shop")
        head = [shop, *heading]
        return {
            "head": head if source.chance(0.7) else head[::-1],
            "meta": meta if source.chance(0.5) else meta[::-1],
            "items": items,
            "sums": sums,
            "tail": tail,
        }


def compose_receipt(source: Source, layout: str, font: str, height: int, width: int) -> Composition | None:
    """Draws a receipt; None where it does not fit the page."""
    return compose(source, FAMILIES[layout], _draw_sections(source), QUESTIONS, font, height, width)


def compose_slip(source: Source, layout: str, font: str, height: int, width: int) -> Composition | None:
    """Draws a slip; None where it does not fit the page."""
    drawn = _draw_sections(source)
    entries = [*drawn["meta"], *drawn["items"], *drawn["sums"]]
    shuffled: list[Line] = [entries[i] for i in source.rng.permutation(len(entries))]
    sections = {"head": drawn["head"], "entries": shuffled, "tail": drawn["tail"]}
    return compose(source, SLIP_FAMILIES[layout], sections, QUESTIONS, font, height, width)
