# SPDX-License-Identifier: Apache-2.0
"""Question templates: several wordings per task with the same meaning, of which one is drawn at random."""

CAPTION = (
    "Describe the image in one short sentence.",
    "Write a short caption for this picture.",
    "What does the picture show?",
    "Give a brief description of the image.",
    "Say in one sentence what can be seen here.",
    "What is in the image?",
)
COLOR = (
    "What color is {expr}?",
    "What is the color of {expr}?",
    "Which color does {expr} have?",
    "Tell me the color of {expr}.",
    "{Expr} is what color?",
)
SHAPE = (
    "What shape is {expr}?",
    "What is the shape of {expr}?",
    "Which shape does {expr} have?",
    "Tell me the shape of {expr}.",
    "{Expr} has what shape?",
)
COUNT = (
    "How many {nouns} are there?",
    "How many {nouns} are in the image?",
    "What is the number of {nouns}?",
    "How many {nouns} can you see?",
    "Count the {nouns}.",
)
ATTRIBUTE_YESNO = (
    "Is {expr} {word}?",
    "Would you call {expr} {word}?",
    "Is it true that {expr} is {word}?",
    "{Expr}: is it {word}?",
)
COUNT_COMPARISON = (
    "Are there more {first} than {second}?",
    "Does the image show more {first} than {second}?",
    "Do the {first} outnumber the {second}?",
    "Is the number of {first} greater than that of {second}?",
)
RELATION = (
    "Is {first} {relation} {second}?",
    "Is it true that {first} is {relation} {second}?",
    "{First} is {relation} {second}. Is that right?",
    "Does the image show {first} {relation} {second}?",
    "Yes or no: {first} is {relation} {second}.",
)
EXISTENCE = (
    "Is there {noun} in the image?",
    "Is there {noun}?",
    "Does the image contain {noun}?",
    "Can you see {noun} in the picture?",
    "Do you find {noun} here?",
)
TAGS = (
    "List the tags of the image.",
    "Which words describe what is in the image?",
    "Name the shapes, colors and patterns you see.",
    "What tags fit this picture?",
)
REC = (
    "Where is {expr}?",
    "Give the box of {expr}.",
    "Locate {expr} in the image.",
    "What are the coordinates of {expr}?",
    "Find {expr} and give its position.",
    "Please point out {expr} with a box.",
    "In the picture, where can I find {expr}?",
)
RES = (
    "Segment {expr}.",
    "Give the mask of {expr}.",
    "Mark every pixel of {expr}.",
    "Outline {expr} in the image.",
    "Please cut out {expr}.",
)
REG = (
    "What is at {box}?",
    "Describe the object in {box}.",
    "Which object lies in the region {box}?",
    "Give an expression that fits only the object at {box}.",
    "Name what you see inside {box}.",
)
BOX_COLOR = (
    "What color is the object at {box}?",
    "Which color has the thing in {box}?",
    "Tell me the color of what lies in {box}.",
    "The object in the region {box} is what color?",
)
BOX_SHAPE = (
    "What shape is the object at {box}?",
    "Which shape has the thing in {box}?",
    "Tell me the shape of what lies in {box}.",
    "The object in the region {box} has what shape?",
)
BOX_TEXTURE = (
    "Is the object at {box} plain, striped or dotted?",
    "What pattern has the thing in {box}?",
    "Tell me the pattern of what lies in {box}.",
    "The object in the region {box} has what pattern?",
)
BOX_ATTRIBUTE_YESNO = (
    "Is the object at {box} {word}?",
    "Would you call the thing in {box} {word}?",
    "What lies in {box}: is it {word}?",
    "Is it true that the object in the region {box} is {word}?",
)
GROUNDED_CAPTION = (
    "Describe the main objects and give the box of each.",
    "Caption the image with a box after each object.",
    "Which main objects are in the image, and where?",
    "Name the main objects together with their positions.",
    "Write a caption that says where each main object is.",
)
COREFERENCE_COLOR = ("What color is it?", "And its color?", "Which color does it have?", "Tell me its color.")
COREFERENCE_ATTRIBUTE_YESNO = ("Is it {word}?", "And is it {word}?", "Would you call it {word}?", "Is that one {word}?")
SAME_COLOR = (
    "How many objects have that color?",
    "How many objects share this color, that one included?",
    "Counting it too, how many objects are of this color?",
    "What is the number of objects in that color?",
)


def sample_question(templates: tuple[str, ...], rng, **words: str) -> str:
    """A randomly drawn template with its placeholders filled in; {Expr} is {expr} with a capital first letter."""
    capital = {key.capitalize(): word[:1].upper() + word[1:] for key, word in words.items()}
    return templates[rng.integers(len(templates))].format(**words, **capital)
