"""Make the problems of configs/smollm2: receipts, tickets and questions, each for training and held out.

Small enough for a model of 135 million parameters on two cores: prompts of some 50 tokens, answers of a few.
Training and held-out problems share no shop and no item (receipts), no wording (tickets) and no question.
Everything is a function of the constants below.

    python tools/make_smollm2_tasks.py
"""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import click

from shardes.runs.directory import write_lines

SEED = 0
NUM_TRAIN, NUM_HELDOUT = 192, 128

SHOPS = (
    (
        *("Mill Cafe", "Corner Shop", "Green Market", "The Bread Box"),
        *("Hill Books", "Station Kiosk", "Lake Store"),
    ),
    ("Old Bakery", "Park Grocery", "River Stationers", "The Tea Room"),
)
ITEMS = (
    ("tea", "cake", "rice", "soap", "apples", "pens", "bread", "cheese", "stamps", "milk", "candles", "soup"),
    ("coffee", "paper", "plums", "honey", "rolls", "ink"),
)
PAYMENTS = ("by card", "in cash", "by phone")

TICKETS = {
    "billing": (
        (
            "I was charged twice for {item}.",
            "The invoice for {item} shows the wrong amount.",
            "Why did you take money for {item} from my account again?",
            "My card was declined when I paid for {item}.",
            "Please send me a receipt for the payment of {item}.",
            "The price of {item} on my statement is higher than in the shop.",
            "I do not understand the tax on the bill for {item}.",
            "You promised a discount on {item} but I paid the full price.",
        ),
        (
            "There are two payments for {item} on my bank statement.",
            "The bill for {item} is too high.",
            "I paid for {item} and got no invoice.",
            "Can I pay for {item} in two parts?",
        ),
    ),
    "delivery": (
        (
            "My parcel with {item} has not arrived.",
            "The courier left {item} at the wrong house.",
            "When will {item} be shipped?",
            "The tracking page for {item} has not changed for a week.",
            "Can you send {item} to another address?",
            "Nobody was at home when the driver came with {item}.",
            "{item} should have been here on Monday.",
            "The box with {item} was left out in the rain.",
        ),
        (
            "I am still waiting for {item}, which I ordered weeks ago.",
            "The driver could not find my door, so {item} went back to the depot.",
            "Where is the package with {item}?",
            "Please bring {item} after six in the evening.",
        ),
    ),
    "account": (
        (
            "I forgot my password, so I cannot see my order of {item}.",
            "How do I change my email address? I ordered {item} with the old one.",
            "I cannot log in to look at {item}.",
            "Please delete my profile; I will not buy {item} again.",
            "The code to sign in never comes, and I want to order {item}.",
            "My user name is wrong on the page of {item}.",
            "I want two people to use my login to buy {item}.",
            "Someone else signed in as me and looked at {item}.",
        ),
        (
            "The site says my login is blocked since I looked at {item}.",
            "How can I reset my password? I want to buy {item}.",
            "Please change the name on my profile; {item} was ordered under the old one.",
            "I cannot sign up to order {item}.",
        ),
    ),
}
TICKET_ITEMS = ("a lamp", "two chairs", "the blue coat", "a kettle", "my new phone", "the desk", "a bicycle")

CAPITALS = (
    "France:Paris Italy:Rome Spain:Madrid Germany:Berlin Poland:Warsaw Austria:Vienna Greece:Athens "
    "Norway:Oslo Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen Portugal:Lisbon "
    "Ireland:Dublin Hungary:Budapest "
    "Japan:Tokyo China:Beijing India:Delhi Egypt:Cairo Kenya:Nairobi Canada:Ottawa Cuba:Havana Peru:Lima "
    "Chile:Santiago Turkey:Ankara Russia:Moscow Ukraine:Kyiv Romania:Bucharest Bulgaria:Sofia"
)
SYMBOLS = (
    "gold:Au silver:Ag iron:Fe copper:Cu tin:Sn lead:Pb zinc:Zn sodium:Na helium:He neon:Ne carbon:C "
    "oxygen:O nitrogen:N sulfur:S calcium:Ca potassium:K mercury:Hg nickel:Ni"
)
OPPOSITES = (
    "hot:cold big:small fast:slow old:young wet:dry high:low open:shut early:late hard:soft full:empty "
    "light:dark loud:quiet rich:poor strong:weak thick:thin clean:dirty left:right up:down near:far "
    "sweet:sour"
)
PLURALS = (
    "child:children mouse:mice foot:feet tooth:teeth goose:geese man:men leaf:leaves knife:knives ox:oxen"
)
QUESTIONS = {
    "What is the capital of {}?": CAPITALS,
    "What is the chemical symbol of {}?": SYMBOLS,
    "What is the opposite of {}?": OPPOSITES,
    "What is the plural of {}?": PLURALS,
}


def receipt(random: Random, shops: Sequence[str], items: Sequence[str]) -> dict[str, Any]:
    """Return a receipt that states its total, among other amounts."""
    bought = [(random.choice((1, 1, 2, 3)), item) for item in random.sample(items, random.choice((2, 3)))]
    prices = [random.randrange(16, 120) * 5 for _ in bought]
    total = sum(count * price for (count, _), price in zip(bought, prices, strict=True))
    lines = ", ".join(
        f"{count} x {item} at {cents(price)}" for (count, item), price in zip(bought, prices, strict=True)
    )
    shop, payment = random.choice(shops), random.choice(PAYMENTS)
    text = f"{shop}. {lines}. Total {cents(total)}, paid {payment}."
    return {"receipt": text, "total": total / 100}


def cents(amount: int) -> str:
    """Return an amount of cents as a decimal number."""
    return f"{amount // 100}.{amount % 100:02d}"


def tickets(part: int) -> list[dict[str, Any]]:
    """Return all tickets of a part: 0 for training, 1 held out."""
    rows = []
    for label, parts in TICKETS.items():
        for wording in parts[part]:
            for item in TICKET_ITEMS:
                text = wording.format(item=item)
                rows.append({"text": text[0].upper() + text[1:], "label": label})
    return rows


def questions() -> list[dict[str, Any]]:
    """Return all questions, each with its shortest right answer."""
    rows = []
    for wording, pairs in QUESTIONS.items():
        for about, answer in (pair.split(":") for pair in pairs.split()):
            rows.append({"prompt": wording.format(about), "answer": answer})
    return rows


@click.command(help=__doc__)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(__file__).parent.parent / "configs" / "smollm2",
    help="Directory to write to.",
)
def main(out: Path) -> None:
    random = Random(SEED)
    for part, (name, count) in enumerate((("train", NUM_TRAIN), ("heldout", NUM_HELDOUT))):
        rows = [receipt(random, SHOPS[part], ITEMS[part]) for _ in range(count)]
        write_lines(out / f"receipts-{name}.jsonl", rows)
        rows = tickets(part)
        random.shuffle(rows)
        write_lines(out / f"tickets-{name}.jsonl", rows)
    rows = questions()
    random.shuffle(rows)
    write_lines(out / "questions-heldout.jsonl", rows[:32])
    write_lines(out / "questions-train.jsonl", rows[32:])


if __name__ == "__main__":
    main()
