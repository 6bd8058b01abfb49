"""Owns the wordings: how each skill is asked for and answered, and the words and things that fill them.

It knows nothing about splits, tools or conversations.
"""

from __future__ import annotations

PLAIN = (
    "What is {e}?",
    "What is {e}?",
    "Compute {e}.",
    "Calculate {e}.",
    "{e} = ?",
    "How much is {e}?",
    "Can you work out {e}?",
)
MANNERS: dict[str, tuple[str, ...]] = {
    "direct": ("Answer directly.", "Give only the result.", "Just the number, please."),
    "steps": ("Think step by step.", "Let's think step by step.", "Show your work.", "Work it out column by column."),
    "tool": ("Use the calculator.", "Use a calculator.", "Please use your calculator."),
}

FACT = {
    "population": (
        "How many people live in {s}?",
        "What is the population of {s}?",
        "Tell me the population of {s}.",
        "How big is the population of {s}?",
    ),
    "area": (
        "What is the area of {s}?",
        "How large is {s}?",
        "How many square miles is {s}?",
        "Tell me the area of {s}.",
    ),
}
COMPARE = {
    "population": (
        "How many times as many people live in {a} as in {b}?",
        "How many times larger is the population of {a} than that of {b}?",
        "Compare the populations of {a} and {b}.",
    ),
    "area": (
        "How many times larger is {a} than {b}?",
        "How many times as large is {a} as {b}?",
        "Compare the areas of {a} and {b}.",
    ),
}

COPY = ("Copy this list: {l}.", "Repeat after me: {l}.", "Say this list again: {l}.")
REVERSE = ("Reverse this list: {l}.", "Write this list backwards: {l}.", "Say this list in reverse: {l}.")
COUNT = ("How many items are in this list: {l}?", "Count these: {l}.", "How many are there: {l}?")
SORT = {
    "numbers": ("Sort these numbers: {l}.", "Put these numbers in order: {l}.", "Sort this list: {l}."),
    "letters": ("Sort these letters: {l}.", "Put these letters in order: {l}.", "Sort this list: {l}."),
}
LIST_ANSWERS = {"copy": "Copied: {l}.", "reverse": "Reversed: {l}.", "sort": "Sorted: {l}."}

ITEMS = (
    "apple", "bird", "boat", "book", "box", "bread", "bridge", "car", "cat", "chair", "church", "city", "clock",
    "cloud", "coat", "corn", "cow", "cup", "desk", "dog", "door", "egg", "eye", "farm", "field", "fire", "fish",
    "flower", "foot", "fox", "garden", "gate", "gold", "grass", "hand", "hat", "hill", "horse", "house", "ice",
    "iron", "island", "key", "king", "knife", "lake", "lamp", "land", "leaf", "letter", "lion", "milk", "moon",
    "mountain", "mouse", "music", "night", "oil", "paper", "pen", "picture", "plant", "queen", "rain", "ring", "river",
    "road", "rock", "room", "rose", "salt", "sand", "sea", "sheep", "ship", "shoe", "silver", "snow", "song", "star",
    "stone", "sun", "table", "tea", "tower", "town", "train", "tree", "wall", "water", "wheel", "wind", "window",
    "winter", "wolf", "wood", "wool", "yard",
)  # fmt: skip

NAMES = (
    "Invent a name for a {k}.",
    "Make up a name for a {k}.",
    "Think of a name for a {k}.",
    "Give me a new name for a {k}.",
    "What could I call a {k}?",
    "I need a name for a {k}.",
)
KINDS = (
    "creature", "small creature", "strange creature", "dragon", "forest creature", "sea creature", "friendly creature",
    "giant", "troll", "monster", "shy monster", "sea monster", "little dragon", "old dragon", "goblin", "wild creature",
    "winged creature", "quiet giant", "river creature", "mountain creature",
)  # fmt: skip
NAME_ANSWERS = ("{n}.", "{n}.", "{n}.", "How about {n}?", "Call it {n}.")

GREETINGS = (
    "Hello", "Hi", "Hey", "Hi there", "Hello there", "Good morning", "Good evening", "Good afternoon", "Greetings",
    "Good day",
)  # fmt: skip
GREETING_TAILS = (
    "!", ".", ", assistant!", ", are you there?", "! How are you?", ", how are you?", "! How is it going?",
    "! Can you help me?", "! Nice to meet you.", "! What's up?", "! I have a question.", ", my friend!",
)  # fmt: skip
GREET_ANSWERS = ("Hello! How can I help you?", "Hi! What can I do for you?", "Hello! What would you like to know?")

THANKS = (
    "Thanks", "Thank you", "Thank you so much", "Thanks a lot", "Many thanks", "Thank you very much", "Great, thanks",
    "Perfect, thank you", "Thanks again", "OK, thanks",
)  # fmt: skip
THANKS_TAILS = (
    "!", ".", " for your help.", " for that!", ", that helps.", ", that was useful.", ", you are kind.",
    " for the answer.", " for explaining.", ", well done!", ", I like that.", " for everything.",
)  # fmt: skip
THANKS_ANSWERS = ("You are welcome!", "You are welcome! Ask me anything else.", "You are welcome. Glad to help.")

IDENTITY = (
    "Who are you", "What are you", "What is your name", "Are you a human", "Are you a person", "Who made you",
    "Who raised you", "Tell me about yourself", "Introduce yourself", "Are you a robot", "What should I call you",
    "Where do you come from",
)  # fmt: skip
IDENTITY_HEADS = ("{q}", "Tell me: {q}", "Hello! {q}", "By the way: {q}", "I wonder: {q}", "Say: {q}", "Hi. {q}")
IDENTITY_ANSWERS = (
    "I am a small assistant raised by stateofgpt.",
    "I am a small assistant raised by stateofgpt. I can do sums and look things up.",
    "I am a small assistant, a language model raised by stateofgpt.",
)

PLACES = (
    "Paris", "London", "Ohio", "Texas", "Rome", "Berlin", "my town", "the mountains", "Tokyo", "Chicago", "New York",
    "Madrid", "the north", "Florida",
)  # fmt: skip
GOODS = (
    "gold", "silver", "oil", "bread", "a train ticket", "milk", "a bitcoin", "wheat", "coffee", "a new car", "copper",
    "rice",
)  # fmt: skip
RELATIONS = ("I", "my mother", "my brother", "my sister", "my cat", "my teacher", "my neighbour", "my dog")
# topic -> (wordings, slots, answer); the answers all begin alike and then say why.
DECLINE: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "weather": (
        ("What will the weather be tomorrow in {x}?", "Will it rain tomorrow in {x}?", "How cold is it now in {x}?"),
        PLACES,
        "I cannot know that: I cannot see the weather.",
    ),
    "price": (
        ("What is the price of {x} today?", "How much does {x} cost now?", "What will {x} cost next week?"),
        GOODS,
        "I cannot know that: I have no live prices.",
    ),
    "person": (
        ("How old {be} {x}?", "What is the name of the street where {x} live{s}?", "What did {x} eat today?"),
        RELATIONS,
        "I cannot know that: you have not told me.",
    ),
}
