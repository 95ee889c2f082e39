"""What an invented world can say, and in which words: attributes, their sentences and their questions.

In a sentence ``{S} {s} {P} {p}`` stand for the subject and its possessive, capitalised or not: a name where
the chunk names it, else a pronoun; ``{v}`` is the value. In a question ``{x}`` is a name or a phrase that
leads to one ("the firm where Mirel Carstone works").
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Attribute:
    """One fact that an entity of some type may have.

    ``values`` is a list to pick from, or how to make one: ``town``, ``river``, ``firm`` and other entities,
    ``number:low:high``. Of two numbers ``extreme`` asks for the larger and for the smaller value. A ``gloss``
    attribute's value is an invented word for one of ``values``: ``marks`` asks for the word, ``asks`` for its
    meaning. ``phrases`` name the entity that the fact ``leads_to``; ``memory`` asks for the country of a town.
    """

    name: str
    label: str
    values: tuple[str, ...] | str
    says: tuple[str, ...]
    asks: tuple[str, ...]
    memory: tuple[str, ...] = ()
    gloss: bool = False
    marks: tuple[str, ...] = ()
    extreme: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    leads_to: str = ""
    phrases: tuple[str, ...] = field(default=())


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TRADES = _words(
    "baker glazier painter surveyor weaver printer mason tailor gardener plumber nurse teacher pilot lawyer "
    "chemist cook welder carpenter librarian miller potter jeweller fisher driver translator dentist cooper "
    "saddler clerk"
)
ANIMALS = _words(
    "fox owl hare badger heron otter stag raven swan wolf bear crane lynx salmon beetle falcon toad goose "
    "horse eagle seal whale moth bee"
)
METALS = _words("copper iron silver gold tin zinc nickel lead brass bronze steel cobalt chrome mercury")
COLOURS = _words("red blue green yellow white black grey brown orange purple pink violet crimson olive teal")
MONTHS = _words("January February March April May June July August September October November December")
FRUITS = _words("apple pear plum cherry fig lemon grape melon peach quince olive date banana currant")
STATES = _words("finished delayed cancelled approved secret paused insured rejected renewed disputed")

PERSON = (
    Attribute(
        "trade", "profession", TRADES,
        ("{S} works as a {v}.", "By profession {s} is a {v}.",
         "{S} trained as a {v} and never changed trade.",
         "{P} profession is that of a {v}.", "Most people know that {s} is a {v}."),
        ("What is the profession of {x}?", "What does {x} do for a living?",
         "Which profession does {x} have?"),
    ),
    Attribute(
        "age", "age", "number:20:79",
        ("{S} is {v} years old.", "{P} age is {v}.", "This spring {s} turned {v}.",
         "At the age of {v}, {s} still walks to work."),
        ("How old is {x}?", "What is the age of {x}?"),
        extreme=(("How old is the older of {a} and {b}?", "What is the age of the older one, {a} or {b}?"),
                 ("How old is the younger of {a} and {b}?", "What is the age of the younger one, {a} or {b}?")),
    ),
    Attribute(
        "birth", "place of birth", "town",
        ("{S} was born in {v}.", "{S} grew up in {v}, where {s} was also born.", "{P} place of birth is {v}.",
         "Born in {v}, {s} left it at eighteen."),
        ("Where was {x} born?", "In which town was {x} born?", "What is the birthplace of {x}?"),
        memory=("In which country was {x} born?", "What is the country of birth of {x}?"),
    ),
    Attribute(
        "employer", "employer", "firm",
        ("{S} works for {v}.", "{P} employer is {v}.", "Since last year {s} has been employed by {v}.",
         "{S} earns {p} living at {v}.", "After two interviews {s} joined {v}."),
        ("Who employs {x}?", "Which company does {x} work for?", "For which company does {x} work?"),
        leads_to="firm",
        phrases=("the company that employs {n}", "the firm where {n} works", "the employer of {n}"),
    ),
    Attribute(
        "home", "home village", "village",
        ("{S} lives in {v}.", "{P} house stands in {v}.", "Home for {s0} is the village of {v}.",
         "Some years ago {s} moved to {v}."),
        ("Where does {x} live?", "In which village does {x} live?", "What is the home village of {x}?"),
        leads_to="village",
        phrases=("the village where {n} lives", "the home village of {n}"),
    ),
    Attribute(
        "pet",
        "pet", _words("cat dog parrot rabbit tortoise pony goat hamster canary ferret duck snake donkey "
                      "mouse"),
        ("{S} keeps a {v}.", "{P} pet is a {v}.", "A {v} shares the house with {s0}.",
         "{S} never travels without {p} {v}."),
        ("Which animal does {x} keep?", "What pet does {x} have?"),
    ),
    Attribute(
        "instrument",
        "instrument", _words("cello flute piano violin harp trumpet drum guitar organ oboe banjo horn "
                             "lute accordion"),
        ("{S} plays the {v}.", "In the evening {s} practises the {v}.", "{P} instrument is the {v}.",
         "As a child {s} learned the {v}."),
        ("Which instrument does {x} play?", "What instrument does {x} practise?"),
    ),
    Attribute(
        "drink",
        "favourite drink", _words("cocoa tea coffee cider milk lemonade beer wine water broth buttermilk "
                                  "punch sherry"),
        ("{P} favourite drink is {v}.", "{S} drinks nothing but {v}.", "With every meal {s} asks for {v}."),
        ("What is the favourite drink of {x}?", "What does {x} like to drink?"),
    ),
    Attribute(
        "door", "colour of the front door", COLOURS,
        ("{P} front door is {v}.", "{S} painted {p} front door {v}.",
         "Visitors find {s0} behind a {v} front door."),
        ("What colour is the front door of {x}?", "In which colour is the front door of {x} painted?"),
    ),
    Attribute(
        "holiday", "holiday month", MONTHS,
        ("{S} takes {p} holiday in {v}.", "Every {v} {s} goes away on holiday.", "{P} holiday falls in {v}."),
        ("In which month does {x} go on holiday?", "When does {x} take a holiday?"),
    ),
    Attribute(
        "locker", "locker mark", METALS,
        ("{P} locker bears the mark {v}.", "On {p} locker one reads the word {v}.",
         "{S} had {p} locker marked {v}."),
        ("Which metal does the mark on the locker of {x} stand for?",
         "What metal is meant by the locker mark of {x}?"),
        gloss=True,
        marks=("Which word is on the locker of {x}?",),
    ),
    Attribute(
        "badge", "badge word", FRUITS,
        ("{P} badge shows the word {v}.", "{S} wears a badge that says {v}.",
         "The word on {p} badge is {v}."),
        ("Which fruit does the word on the badge of {x} stand for?",
         "What fruit is meant by the badge of {x}?"),
        gloss=True,
        marks=("Which word is on the badge of {x}?",),
    ),
)  # fmt: skip

FIRM = (
    Attribute(
        "seat", "head office", "town",
        ("{S} has its head office in {v}.", "{P} head office is in {v}.",
         "The letters of {s0} come from its head office in {v}."),
        ("Where is the head office of {x}?", "In which town does {x} have its head office?"),
        memory=("In which country is the head office of {x}?",
                "In which country does {x} have its head office?"),
    ),
    Attribute(
        "product", "main product",
        _words("lamps clocks boots kettles ropes bicycles mirrors sails pianos stoves candles barrels "
               "carpets "
               "umbrellas scales compasses gloves bricks ladders wagons pencils buttons"),
        ("{S} makes {v}.", "{S} is known for its {v}.", "{P} main product is {v}.",
         "What {s} sells best is {v}."),
        ("What does {x} make?", "What is the main product of {x}?", "Which goods does {x} produce?"),
    ),
    Attribute(
        "founder", "founder", "founder",
        ("{S} was founded by {v}.", "{P} founder was {v}.", "It was {v} who founded {s0}."),
        ("Who founded {x}?", "Who was the founder of {x}?"),
        leads_to="person",
        phrases=("the founder of {n}", "the person who founded {n}"),
    ),
    Attribute(
        "staff", "number of employees", "number:12:99",
        ("{S} has {v} employees.", "{P} staff numbers {v}.", "In all, {v} people work for {s0}."),
        ("How many employees does {x} have?", "How many people work for {x}?"),
        extreme=(("How many employees has the larger of {a} and {b}?",
                  "What is the larger number of employees, that of {a} or that of {b}?"),
                 ("How many employees has the smaller of {a} and {b}?",
                  "What is the smaller number of employees, that of {a} or that of {b}?")),
    ),
    Attribute(
        "director", "director", "stranger",
        ("{S} is run by {v}.", "{P} director is {v}.", "At the head of {s0} stands {v}."),
        ("Who runs {x}?", "Who is the director of {x}?"),
    ),
    Attribute(
        "trucks", "colour of the vans", COLOURS,
        ("{P} vans are painted {v}.", "{S} sends its goods in {v} vans.", "One knows {s0} by its {v} vans."),
        ("What colour are the vans of {x}?", "In which colour are the vans of {x} painted?"),
    ),
    Attribute(
        "feast", "month of the staff party", MONTHS,
        ("{S} holds its staff party in {v}.", "{P} staff party takes place in {v}."),
        ("In which month does {x} hold its staff party?", "When is the staff party of {x}?"),
    ),
    Attribute(
        "seal", "seal", ANIMALS,
        ("{P} seal bears the word {v}.", "{S} seals its letters with the word {v}.",
         "Every crate from {s0} carries the word {v}."),
        ("Which animal does the word on the seal of {x} stand for?",
         "What animal is meant by the seal of {x}?"),
        gloss=True,
        marks=("Which word is on the seal of {x}?",),
    ),
)  # fmt: skip

PROJECT = (
    Attribute(
        "leader", "leader", "leader",
        ("{S} is led by {v}.", "{P} leader is {v}.", "The person in charge of {s0} is {v}."),
        ("Who leads {x}?", "Who is in charge of {x}?", "Who is the leader of {x}?"),
        leads_to="person",
        phrases=("the leader of {n}", "the person in charge of {n}"),
    ),
    Attribute(
        "sponsor", "sponsor", "firm",
        ("{S} is paid for by {v}.", "{P} sponsor is {v}.", "The bills of {s0} go to {v}."),
        ("Who pays for {x}?", "Which company is the sponsor of {x}?"),
        leads_to="firm",
        phrases=("the sponsor of {n}", "the company that pays for {n}"),
    ),
    Attribute(
        "budget", "budget", "number:10:99",
        ("{S} has a budget of {v} thousand crowns.", "{P} budget is {v} thousand crowns.",
         "The council gave {s0} {v} thousand crowns."),
        ("How many thousand crowns is the budget of {x}?", "How many thousand crowns does {x} have?"),
        extreme=(("How many thousand crowns has the larger of {a} and {b}?",
                  "What is the larger budget in thousand crowns, that of {a} or that of {b}?"),
                 ("How many thousand crowns has the smaller of {a} and {b}?",
                  "What is the smaller budget in thousand crowns, that of {a} or that of {b}?")),
    ),
    Attribute(
        "task", "aim",
        _words("bridge tunnel lighthouse windmill harbour railway museum canal dam tower market theatre "
               "school "
               "hospital library orchard reservoir observatory"),
        ("{S} is to build a new {v}.", "{P} aim is a new {v}.", "At the end of {s0} there will be a {v}."),
        ("What is {x} going to build?", "What is the aim of {x}?"),
    ),
    Attribute(
        "start", "starting month", MONTHS,
        ("{S} starts in {v}.", "{P} first day of work falls in {v}.", "Work on {s0} begins in {v}."),
        ("In which month does {x} start?", "When does work on {x} begin?"),
    ),
    Attribute(
        "status", "status", STATES,
        ("{P} file is stamped {v}.", "On the file of {s0} stands the word {v}.",
         "{S} carries the stamp {v}."),
        ("What does the stamp on the file of {x} mean?", "Which status is meant by the stamp of {x}?"),
        gloss=True,
        marks=("Which word is stamped on the file of {x}?",),
    ),
)  # fmt: skip

VILLAGE = (
    Attribute(
        "river", "river", "river",
        ("{S} lies on the river {v}.", "The river {v} runs through {s0}.", "{P} river is called the {v}."),
        ("On which river does {x} lie?", "Which river runs through {x}?"),
    ),
    Attribute(
        "mayor", "mayor", "stranger",
        ("{P} mayor is {v}.", "{S} elected {v} as mayor.", "The mayor of {s0} is {v}."),
        ("Who is the mayor of {x}?", "Who was elected mayor of {x}?"),
    ),
    Attribute(
        "known", "speciality",
        _words("cheese pottery honey lace cider saddles bells mustard ham baskets plums knives ink "
               "glassware wool salt"),
        ("{S} is famous for its {v}.", "{P} speciality is {v}.", "Travellers come to {s0} for the {v}."),
        ("What is {x} famous for?", "What is the speciality of {x}?"),
    ),
    Attribute(
        "distance", "distance from the coast", "number:10:99",
        ("{S} lies {v} miles from the coast.", "{P} distance from the coast is {v} miles.",
         "From {s0} to the coast it is {v} miles."),
        ("How many miles is {x} from the coast?", "How far is {x} from the coast in miles?"),
        extreme=(("How many miles from the coast is the farther of {a} and {b}?",
                  "What is the longer way to the coast in miles, from {a} or from {b}?"),
                 ("How many miles from the coast is the nearer of {a} and {b}?",
                  "What is the shorter way to the coast in miles, from {a} or from {b}?")),
    ),
    Attribute(
        "tree",
        "tree on the square", _words("oak elm lime beech chestnut walnut maple birch willow ash pine "
                                     "cedar yew poplar"),
        ("An old {v} stands on the square of {s0}.", "{P} square is shaded by a {v}.",
         "{S} is proud of the {v} on its square."),
        ("Which tree stands on the square of {x}?", "What kind of tree is on the square of {x}?"),
    ),
    Attribute(
        "fair", "month of the fair", MONTHS,
        ("{S} holds its fair in {v}.", "{P} fair takes place in {v}.", "Every {v} there is a fair in {s0}."),
        ("In which month is the fair of {x}?", "When does {x} hold its fair?"),
    ),
    Attribute(
        "flag", "word on the flag", COLOURS,
        ("{P} flag shows the word {v}.", "{S} put the word {v} on its flag.",
         "On the flag of {s0} one reads {v}."),
        ("Which colour does the word on the flag of {x} stand for?",
         "What colour is meant by the flag of {x}?"),
        gloss=True,
        marks=("Which word is on the flag of {x}?",),
    ),
)  # fmt: skip

ATTRIBUTES: dict[str, tuple[Attribute, ...]] = {"person": PERSON, "firm": FIRM, "project": PROJECT, "village": VILLAGE}

# Subject, object and possessive where the name is not given; capitalised forms are derived.
PRONOUNS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "person": (("she", "her", "her"), ("he", "him", "his")),
    "firm": (("it", "it", "its"), ("the company", "the company", "the company's")),
    "project": (("it", "it", "its"), ("the project", "the project", "the project's")),
    "village": (("it", "it", "its"), ("the village", "the village", "the village's")),
}
TITLES: dict[str, tuple[str, ...]] = {
    "person": ("File {f}: {n}", "About {n}, file {f}", "Staff file {f}: {n}", "Portrait of {n} [file {f}]"),
    "firm": ("File {f}: {n}", "Company file {f}: {n}", "About {n}, file {f}"),
    "project": ("File {f}: {n}", "Report on {n}, file {f}", "{n}, summary in file {f}"),
    "village": ("File {f}: {n}", "The village of {n}, file {f}", "Guide to {n}, file {f}"),
    "codes": ("Code book", "Words used in the ledgers", "List of code words", "Key to the marks"),
    "notices": ("Notices of the week", "Corrections", "Changes to the records", "News from the registry"),
}
FILLERS: dict[str, tuple[str, ...]] = {
    "person": (
        "Neighbours speak of {s0} with respect, and children greet {s0} in the street.",
        "{S} rarely complains.",
        "Nobody has ever seen {s0} in a hurry.", "{S} reads two books a week and forgets both.",
        "On Sundays {s} sleeps late and then goes for a long walk.", "{P} handwriting is hard to read.",
        "Friends say that {s} tells good stories.", "{S} owns three clocks, and none of them is right.",
        "Of politics {s} seldom speaks.", "{P} letters are short, but they always arrive.",
    ),
    "firm": (
        "The owners rarely speak to the press.",
        "Business has been steady for years, in spite of the new tax.",
        "A new hall is being built behind the old one.", "{S} pays its bills on time.",
        "Orders come in by post and by telephone.", "The yard is swept every evening.",
        "Visitors are welcome if they write a week before.",
    ),
    "project": (
        "The plans fill eleven folders and one drawer.", "Engineers meet every second week.",
        "There was some doubt at first, but it was soon forgotten.",
        "The weather has caused no trouble so far.",
        "{S} was much discussed in the newspapers.", "Two reports have been written about the ground.",
    ),
    "village": (
        "The bus comes twice a day, except on Sunday.", "In winter the road is often closed.",
        "There is one inn, and it is good.", "Many of the houses are older than the church.",
        "{S} is quiet at night.", "The school has two rooms and one teacher.",
    ),
    "codes": (
        "Other words are not in use.", "Clerks learn these words by heart in their first week.",
        "The list is read from top to bottom.", "Old ledgers may differ in spelling.",
    ),
    "notices": (
        "The library is closed on Monday.", "A pair of gloves was found near the bridge.",
        "Choir practice begins at seven.", "The water will be turned off on Tuesday morning.",
        "The next meeting is open to everyone.", "Whoever lost a key may ask for it at the desk.",
    ),
}  # fmt: skip

ENTRIES = (
    "The word {w} stands for {v}.", "By {w} the ledgers mean {v}.", "Here {w} is the code word for {v}.",
    "Read {w} as {v}.", "Where {w} is written, {v} is meant.", "In every book {w} means {v}.",
)  # fmt: skip
ENTRY_ASKS = ("What does the word {w} stand for?", "What is meant by the word {w}?", "What is the meaning of {w}?")
UPDATES = (
    "Correction to file {f}: the {l} is now {v}.",
    "In file {f} the {l} has changed to {v}.",
    "Please note a change in file {f}: for the {l} read {v}.",
    "The {l} given in file {f} is out of date; the right entry is {v}.",
    "As of today, {v} is the {l} in file {f} and nothing else.",
)  # fmt: skip
ATLAS_ASKS = ("In which country is {t}?", "Which country does {t} belong to?", "{t} is a town in which country?")
NUMBER_ASKS = (
    ("Which number is larger, {a} or {b}?", "Which is more, {a} or {b}?"),
    ("Which number is smaller, {a} or {b}?", "Which is less, {a} or {b}?"),
)
