"""Invoices: seller, buyer, number, dates, items, tax, total; four layout families and one held out."""

from parsit_jax.documents.generator import values
from parsit_jax.documents.generator.composition import Composition
from parsit_jax.documents.generator.document import Split
from parsit_jax.documents.generator.entries import Entry, Family, Line, compose
from parsit_jax.documents.generator.values import Source

LABELS = {
    "buyer": ("To", "Bill to", "Client", "For"),
    "number": ("Invoice", "Invoice no", "INVOICE", "No."),
    "date": ("Date", "Issued", "Dated"),
    "due_date": ("Due", "Due by", "Pay by"),
    "tax": ("Tax", "VAT", "GST", "Sales tax"),
    "total": ("Total due", "TOTAL", "Amount due", "To pay", "Total"),
}

QUESTIONS = {
    "seller": "Who is the seller?",
    "buyer": "Who is the buyer?",
    "number": "What is the invoice number?",
    "date": "What is the invoice date?",
    "due_date": "What is the due date?",
    "item": "What is the price of {label}?",
    "tax": "What is the tax?",
    "total": "What is the total?",
}

TITLES = ("INVOICE", "Tax invoice", "Invoice", "BILL")

_ORDERS = (("head", "buyer", "meta", "items", "sums"), ("head", "meta", "buyer", "items", "sums"))
_HELD_OUT_ORDERS = (("head", "sums", "buyer", "meta", "items"),)

FAMILIES = {
    "letter": Family(_ORDERS),
    "colon": Family(_ORDERS, style="colon", alignments=(0.0,)),
    "boxed": Family(_ORDERS, alignments=(0.5,), rules=1.0, border=True),
    "columns": Family(_ORDERS, rules=0.5, stacked=("meta",)),
    "sums_first": Family(_HELD_OUT_ORDERS, rules=0.5, split=Split.HELD_OUT),
}

LAYOUTS = {name: (family.split,) for name, family in FAMILIES.items()}


def _draw_sections(source: Source) -> dict[str, list[Line]]:
    """Random content: 7 to 10 lines, no value printed twice."""
    while True:
        count = source.pick((1, 2, 2))
        total = values.cents(source, 1_000)
        parts = values.cents_pair(source, total, total // 25)
        if parts is None:
            continue
        tax, goods = sorted(parts)
        prices = values.cents_parts(source, goods, count)
        money, date = values.money_style(source), values.date_style(source)
        seller, buyer = values.company(source), values.company(source)
        if prices is None or len({tax, total, *prices}) < count + 2 or seller == buyer:
            continue
        first_day, last_day = sorted((values.day(source), values.day(source)))
        if first_day == last_day:
            continue
        case = str.upper if source.chance(0.3) else str
        label = {name: case(source.pick(options)) for name, options in LABELS.items()}
        meta = [
            Entry(label["number"], values.number(source), "number"),
            Entry(label["date"], date(first_day), "date"),
            Entry(label["due_date"], date(last_day), "due_date"),
        ]
        goods_sold = zip(values.items(source, count), prices, strict=True)
        return {
            "head": [Entry("", seller, "seller"), *([source.pick(TITLES)] if source.chance(0.4) else [])],
            "buyer": [Entry(label["buyer"], buyer, "buyer")],
            "meta": meta if source.chance(0.7) else meta[1:] + meta[:1],
            "items": [Entry(case(name), money(price), "item") for name, price in goods_sold],
            "sums": [Entry(label["tax"], money(tax), "tax"), Entry(label["total"], money(total), "total")],
        }


def compose_invoice(source: Source, layout: str, font: str, height: int, width: int) -> Composition | None:
    """Draws an invoice; None where it does not fit the page."""
    return compose(source, FAMILIES[layout], _draw_sections(source), QUESTIONS, font, height, width)
