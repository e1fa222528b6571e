"""The words of the simulated shop: categories in two levels, and what is typically written about each.

The simulator makes titles and texts of them. Invariant: a word of a category is of no other category, so text tells
what an item is.
"""

# top level -> category -> (nouns for titles, words for texts)
SHOP: dict[str, dict[str, tuple[str, str]]] = {
    "outdoor": {
        "camping": ("Tent Lantern Hammock Tarp", "campsite canopy pegs groundsheet sleeping mosquito firelight canvas"),
        "hiking": ("Boots Rucksack Poles Gaiters", "trail summit blister ankle switchback hip-belt ridge waymark"),
        "cycling": ("Saddle Helmet Pannier Pump", "gravel derailleur pedal spokes tyre handlebar tarmac puncture"),
        "climbing": ("Harness Chalkbag Rope Quickdraw", "belay crag boulder anchor granite carabiner overhang grip"),
    },
    "kitchen": {
        "baking": ("Mixer Tin Rolling-pin Whisk", "dough yeast sourdough crust proofing flour pastry oven"),
        "coffee": (
            "Grinder Kettle Dripper Espresso-machine",
            "beans crema roast filter brew barista arabica portafilter",
        ),
        "knives": ("Cleaver Paring-knife Whetstone Board", "blade honing bevel carbon handle tang slicing edge"),
        "preserving": ("Jar Fermenter Dehydrator Canner", "pickle brine jam pectin kimchi lid vinegar cellar"),
    },
    "music": {
        "guitars": ("Acoustic Telecaster Ukulele Capo", "fretboard strings rosewood strum tuning chord pickup luthier"),
        "keys": (
            "Synthesizer Piano Organ Controller",
            "octave hammer oscillator polyphony sustain arpeggio midi patch",
        ),
        "drums": ("Snare Cymbal Cajon Drumkit", "beat rimshot hi-hat shuffle sticks groove kick brushes"),
        "studio": (
            "Microphone Interface Monitor Preamp",
            "condenser mixdown latency phantom recording decibel reverb cable",
        ),
    },
    "garden": {
        "vegetables": ("Seedbox Trowel Cloche Planter", "tomato sowing harvest compost radish mulch allotment pumpkin"),
        "flowers": ("Bulbs Vase Secateurs Trellis", "bloom petal perennial rose pollinator dahlia fragrance border"),
        "lawn": ("Mower Rake Scarifier Sprinkler", "turf moss mowing clippings aeration fescue thatch stripes"),
        "ponds": ("Fountain Liner Skimmer Waterpump", "lily koi algae ripple reeds frog aquatic oxygenating"),
    },
    "games": {
        "boardgames": (
            "Meeple-set Strategy-box Expansion Playmat",
            "dice tiles worker placement turn cardboard rules scoring",
        ),
        "puzzles": ("Jigsaw Cube Labyrinth Cipher", "pieces riddle interlocking solve logic clue mosaic pattern"),
        "consoles": (
            "Gamepad Headset Handheld Charging-dock",
            "framerate joystick platformer multiplayer pixels boss level arcade",
        ),
        "miniatures": (
            "Paintset Battalion Terrain-kit Brushset",
            "sculpt primer skirmish glaze dragon basing regiment diorama",
        ),
    },
}
# fmt: off
ADJECTIVES = (
    "Quiet", "Northern", "Copper", "Little", "Grand", "Amber", "Swift", "Honest", "Winter", "Blue", "Harbour",
    "Silver", "Wild", "Patient", "Bright", "Old", "Velvet", "Hidden", "Golden", "Early",
)
SERIES = (
    "Alder", "Birch", "Cedar", "Dune", "Ember", "Fjord", "Grove", "Heron", "Isle", "Juniper", "Kestrel", "Loch",
    "Maple", "Nettle", "Osprey", "Pine",
)
# fmt: on
PLAIN_TEXT = (
    "made for every day with care a classic that lasts easy to use and simple to keep comes with a guide light sturdy "
    "repairable tested by people who use it often"
)
