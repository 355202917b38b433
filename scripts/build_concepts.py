"""Write autointerp/concepts.txt, the bank of labels that the `pmi` explainer chooses from.

Own work of this project (MIT): the lists below were written by hand for it, and are combined by templates.
Run from the root of the repository: ``python scripts/build_concepts.py`` (``--check`` compares without writing).
"""

import argparse
import sys
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / "autointerp" / "concepts.txt"
HEADER = "# Labels of the pmi explainer, one per line. Made by scripts/build_concepts.py; own work, MIT.\n"


def split(text: str) -> list[str]:
    """Comma-separated phrases of a block of text."""
    return [" ".join(item.split()) for item in text.replace("\n", " ").split(",") if item.strip()]


TOPICS = split("""
    medicine, surgery, diseases, cancer, infections, drugs and dosage, mental health, pregnancy and birth,
    nutrition, anatomy, dentistry, hospitals, clinical trials, genetics, cells and proteins, neuroscience,
    evolution, ecology, plants and botany, insects, birds, fish and the sea, dogs and cats, farming, forests, food
    and cooking, baking, wine and beer, coffee and tea, restaurants, physics, quantum mechanics, relativity,
    astronomy, spaceflight, chemistry, chemical reactions, materials, geology, earthquakes, volcanoes, climate
    change, weather, storms and rain, heat and temperature, energy and power plants, oil and gas, electricity,
    nuclear power, mathematics, algebra, geometry, calculus, probability, statistics, logic and proofs, computers,
    software, operating systems, databases, networks, websites, search engines, machine learning, robots, computer
    security, passwords, video games, mobile phones, cameras and photography, television, radio, film and cinema,
    theatre, acting, music, singing, musical instruments, dance, painting and art, sculpture, architecture, design,
    fashion and clothing, shoes, jewellery, hair and make-up, literature, poetry, novels, comics, journalism, news
    reports, publishing, libraries, language and grammar, translation, philosophy, ethics, religion, Christianity,
    Islam, Judaism, Buddhism, Hinduism, churches, prayer, myths and legends, magic and witches, ghosts, science
    fiction, history, ancient Rome, ancient Greece, ancient Egypt, the Middle Ages, kings and queens, empires,
    colonies, slavery, revolutions, the First World War, the Second World War, the Cold War, war and battles,
    armies, navies and ships, military aircraft, weapons and guns, terrorism, police, crime, murder, theft, prisons,
    courts and trials, lawyers, laws and statutes, contracts, patents, human rights, politics, elections, voting,
    presidents, parliaments, political parties, diplomacy, treaties, immigration, refugees, taxes, government
    spending, economics, inflation, trade, banking, money, stock markets, investment, insurance, companies,
    start-ups, marketing, advertising, sales and prices, shopping, jobs and hiring, wages, trade unions, factories,
    construction, real estate, houses and rooms, furniture, gardening, cleaning, tools, engines and machines, cars,
    driving, roads and traffic, trains, bicycles, aeroplanes, airports, shipping, travel, hotels, tourism, beaches,
    mountains, rivers, lakes, oceans, deserts, islands, maps, cities, villages, schools, universities, students,
    teachers, exams, research papers, experiments, children, babies, parents, family, marriage, divorce, love and
    romance, friendship, sex, gender, death and funerals, old age, sleep and dreams, happiness, sadness, anger,
    fear, pain, hope, pride, guilt and shame, surprise, loneliness, beauty, strength, speed, danger, safety, luck,
    success, failure, conflict, peace, freedom, poverty, wealth, charity, volunteers, football, basketball,
    baseball, tennis, golf, cricket, boxing, athletics, swimming, skiing, the Olympic Games, sports results, teams
    and coaches, chess, gambling, toys, birthdays, Christmas, holidays, parties, gifts, social media, email,
    letters, telephone calls, meetings, time and clocks, calendars, seasons, colours, light, darkness, sound and
    noise, silence, smell, taste, touch, water, fire, air and wind, ice and snow, stone, wood, metal, gold and
    silver, glass, plastic, paper, rubbish and waste, pollution, recycling, hygiene, exercise, diets, smoking,
    alcohol, illegal drugs
""")

NAMES = split("""
    people, men, women, politicians, American presidents, kings and queens, scientists, writers, poets, painters,
    composers, singers, bands, actors, film directors, athletes, football clubs, saints, gods, fictional characters,
    cities, American cities, European cities, Asian cities, capitals, countries, European countries, African
    countries, Asian countries, South American countries, American states, regions, streets, rivers, mountains,
    islands, seas, continents, planets, stars, companies, car makers, software companies, banks, airlines,
    newspapers, magazines, television channels, universities, museums, churches, airports, political parties,
    government agencies, armies, treaties, laws, battles, wars, diseases, medicines, organs of the body, bones,
    animals, mammals, birds, fish, insects, dog breeds, trees, flowers, fruits, vegetables, spices, dishes, drinks,
    cheeses, clothes, fabrics, colours, shapes, metals, chemical elements, minerals, gases, tools, weapons,
    vehicles, ships, aircraft, musical instruments, musical genres, dances, sports, games, films, books, songs,
    television series, newspapers and magazines, programming languages, operating systems, file formats, months,
    days of the week, seasons, holidays, religions, languages, nationalities, ethnic groups, professions, academic
    subjects, military ranks, units of measurement, currencies, family members, parts of a house, furniture, kitchen
    utensils, school subjects, emotions, diseases of animals
""")

COUNTRIES = split("""
    the United States, the United Kingdom, England, Scotland, Ireland, France, Germany, Italy, Spain, Portugal, the
    Netherlands, Belgium, Switzerland, Austria, Poland, Hungary, Greece, Turkey, Russia, Ukraine, Sweden, Norway,
    Denmark, Finland, China, Japan, Korea, India, Pakistan, Iran, Iraq, Israel, Saudi Arabia, Syria, Afghanistan,
    Vietnam, Thailand, Indonesia, the Philippines, Australia, New Zealand, Canada, Mexico, Brazil, Argentina, Chile,
    Cuba, Egypt, Nigeria, South Africa, Kenya, Africa, Europe, Asia, the Middle East, Latin America, California,
    Texas, Florida, New York, London, Paris, Washington, Chicago, Hong Kong, the European Union, the United Nations
""")

LANGUAGES = split("""
    French, German, Spanish, Italian, Portuguese, Dutch, Latin, Greek, Russian, Polish, Swedish, Turkish, Arabic,
    Hebrew, Hindi, Chinese, Japanese, Korean, Vietnamese, Indonesian, Finnish, Hungarian
""")

WORDS = split("""
    the, a, an, this, that, these, those, it, its, he, she, his, her, him, they, them, their, we, us, our, you,
    your, I, me, my, who, which, what, where, when, why, how, and, or, but, if, because, while, although, though,
    so, than, then, as, like, of, in, on, at, to, from, for, with, without, by, about, into, over, under, between,
    through, during, before, after, since, until, against, up, down, out, off, not, no, never, always, often, only,
    just, also, even, still, very, more, most, less, some, any, all, each, every, both, many, much, few, other,
    another, one, two, three, first, last, new, old, good, bad, big, small, long, same, is, are, was, were, be,
    been, being, am, has, have, had, do, does, did, will, would, can, could, may, might, must, should, said, says,
    make, made, get, got, go, went, take, know, think, see, want, use, used, there, here, now, today, people, time,
    year, years, day, way, world
""")

ENDINGS = split("""
    ing, ed, ly, er, est, tion, sion, ment, ness, ity, able, ible, al, ous, ful, less, ive, ic, ism, ist, ship,
    hood, ize, ify, en, ate, ery, age, ance, ence, ology, graphy, ess, ish, y, s, 's, n't
""")

BEGINNINGS = split("""
    un, re, in, im, dis, non, pre, post, anti, over, under, inter, trans, sub, super, micro, multi, bio, geo, hydro,
    photo, electro, neuro, cardio, cyber, auto, counter, semi, self, co, de, ex, mis, out, up, th, wh, ch, sh, str
""")

GRAMMAR = split("""
    nouns, plural nouns, abstract nouns, proper nouns, capitalised words, words in capital letters, acronyms,
    abbreviations, initials, adjectives, comparative adjectives, superlative adjectives, adverbs, adverbs of time,
    adverbs of degree, adverbs of manner, verbs, past tense verbs, present tense verbs, verbs in the future tense,
    past participles, verbs ending in -ing, infinitives after to, passive verbs, auxiliary verbs, modal verbs, verbs
    of motion, verbs of speech, verbs of thinking, verbs of seeing, verbs of giving, verbs of making, verbs of
    change, verbs of destruction, verbs of ownership, imperative verbs, phrasal verbs, negations, contractions,
    pronouns, personal pronouns, possessive pronouns, reflexive pronouns, relative pronouns, articles before nouns,
    demonstratives, prepositions, prepositions of place, prepositions of time, conjunctions, words that express
    contrast, words that express cause, words that express a condition, words that express a purpose, words that
    express comparison, words that express doubt, words that express certainty, words that express quantity, words
    that express frequency, words that express order, words that express direction, words that express distance,
    words that express size, words that express age, words that express duration, words that express the beginning,
    words that express the end, words that express increase, words that express decrease, words that express
    possibility, words that express obligation, words that express permission, words that express agreement, words
    that express refusal, words that express praise, words that express criticism, words that express opinion, words
    that express emotion, words that express similarity, words that express difference, words that express
    importance, question words, quantifiers, intensifiers, interjections, greetings, titles of people such as Mr and
    Dr, first names, surnames, compound words, hyphenated words, rare words, common function words, misspelt words,
    slang, swear words, informal words, formal words, technical terms, foreign words, onomatopoeia, idioms,
    fragments of words, first pieces of words, last pieces of words, middle pieces of long words, single letters,
    words after a comma, words after a full stop, the first word of a sentence, the last word of a sentence, the
    first word of a text, the last word of a text, the subject of a sentence, the object of a verb, words after the
    word of, words after the word the, words after the word to, words after a number, words before a number,
    repeated words, words seen earlier in the text, parts of names, parts of place names, words inside quotation
    marks, words inside brackets, quoted speech, reported speech, words in a list, items separated by commas,
    relative clauses, conditional clauses, subordinate clauses, main verbs
""")

MARKS = split("""
    full stops, commas, semicolons, colons, question marks, exclamation marks, apostrophes, opening quotation marks,
    closing quotation marks, opening brackets, closing brackets, square brackets, curly braces, angle brackets,
    hyphens, dashes, slashes, backslashes, asterisks, underscores, hash signs, at signs, ampersands, percent signs,
    dollar signs, currency symbols, plus signs, equals signs, mathematical symbols, Greek letters, accented letters,
    emoji, ellipses, bullet points, line breaks, blank lines, tabs, indentation, spaces, non-Latin characters,
    Chinese characters, Cyrillic letters, broken characters, digits, single digits, two-digit numbers, four-digit
    numbers, large numbers, decimal numbers, fractions, negative numbers, percentages, numbers written as words,
    ordinal numbers, Roman numerals, years, years of the nineteenth century, years of the twentieth century, recent
    years, dates, months in dates, days in dates, times of day, ages of people, prices, amounts of money, phone
    numbers, postcodes, version numbers, scores of matches, measurements, distances, weights, temperatures, ranges
    of numbers, page numbers, chapter numbers, reference numbers, numbers in lists, numbers in tables, zeros, the
    digit 1, the digit 2, hexadecimal numbers, binary numbers, mathematical formulas, LaTeX commands, coordinates,
    IP addresses, dimensions
""")

CODE = split("""
    source code, Python code, JavaScript code, Java code, C code, C++ code, HTML tags, CSS rules, SQL queries, shell
    commands, JSON data, XML data, YAML files, regular expressions, function definitions, function names, function
    calls, arguments of functions, return statements, class definitions, method names, variable names, variable
    assignments, constants in code, import statements, package names, comments in code, documentation strings,
    string literals, numbers in code, Boolean values, null values, if statements, else branches, for loops, while
    loops, loop indices, list indexing, dictionary keys, exceptions and errors, error messages, print statements,
    logging, unit tests, assertions, type names, type annotations, operators in code, comparison operators,
    arithmetic operators, brackets in code, closing brackets in code, semicolons in code, indentation in code, self
    in Python methods, decorators, file paths, file names, file extensions, URLs, email addresses, domain names,
    HTML attributes, HTML links, image tags, command line options, environment variables, configuration settings,
    git commits, licence notices, copyright notices, hashes and identifiers, database tables, user interface
    elements, buttons and menus, web requests, threads and processes, memory allocation, pointers, arrays, matrices,
    plotting code, numpy code, model training code, random numbers, dates in code, camel case names, snake case
    names, keywords of programming languages, the keyword def, the keyword return, the keyword if, the keyword for,
    the keyword import
""")

FORMS = split("""
    newspaper headlines, news articles, sports reports, financial news, celebrity gossip, weather reports,
    obituaries, film reviews, book reviews, product reviews, positive reviews, negative reviews, complaints,
    advertisements, product descriptions, instructions, recipes, manuals, warnings, frequently asked questions,
    questions, answers to questions, multiple choice questions, trivia questions, riddles, jokes, sarcasm, poems,
    song lyrics, stories, fairy tales, dialogues, interviews, speeches, sermons, prayers, letters to someone,
    emails, spam messages, text messages, tweets, hashtags, user names, forum posts, comments of users, diary
    entries, biographies, encyclopaedia articles, definitions, dictionary entries, scientific abstracts, medical
    reports, legal texts, patents, contracts, terms of service, court rulings, historical accounts, travel guides,
    lists of names, lists of things, tables of numbers, tables of contents, references to papers, citations,
    footnotes, captions of figures, titles of sections, titles of books, names and job titles, addresses, phone
    numbers and contacts, timestamps, quotations, proverbs, claims and opinions, arguments, facts about people,
    facts about places, descriptions of people, descriptions of places, descriptions of objects, descriptions of
    feelings, toxic comments, insults, threats, hate speech, political propaganda, fake news, advice, requests,
    apologies, thanks, promises, orders, wishes, plans for the future, memories of the past, hypothetical
    situations, examples introduced by for example, explanations, summaries, conclusions, introductions, sentences
    with errors, incomplete sentences, short sentences, long sentences, statements in the first person, text in the
    second person, passages about two people, passive sentences
""")

THINGS = split("""
    body parts, hands and fingers, eyes and seeing, heads and faces, hearts and blood, brains and minds, skin, hair,
    teeth, injuries, wounds, doctors and nurses, patients, soldiers, officers, leaders, workers, experts, victims,
    criminals, customers, visitors, neighbours, strangers, enemies, friends, crowds, groups of people,
    organisations, committees, institutions, events, ceremonies, accidents, disasters, fires, floods, attacks,
    protests, strikes, debates, decisions, agreements, plans, projects, problems, solutions, causes, effects,
    reasons, methods, processes, systems, structures, parts of a whole, containers, bottles and cups, boxes, bags,
    doors and windows, walls, floors, roofs, stairs, chairs and tables, beds, screens, keyboards, wires and cables,
    batteries, lamps, wheels, bridges, tunnels, towers, gates, fences, fields, gardens, parks, farms, shops,
    offices, kitchens, bathrooms, bedrooms, meals, breakfast, dinner, meat, bread, milk, eggs, sugar, salt, rice,
    cakes, fruit, soup, horses, cows, pigs, sheep, mice and rats, monkeys, snakes, bears, wolves, lions, elephants,
    bees, butterflies, spiders, dinosaurs, leaves, roots, seeds, grass, soil, sand, clouds, sun, moon, sky, stars,
    waves, light bulbs, mirrors, pictures, photographs, videos, songs, stories and tales, words and letters, names,
    numbers, lists, rules, rights, duties, goals, ideas, beliefs, knowledge, memory, attention, learning, teaching,
    reading, writing, speaking, listening, asking, answering, walking, running, sitting, standing, lying down,
    falling, rising, opening, closing, starting, stopping, continuing, waiting, arriving, leaving, entering,
    returning, buying, selling, paying, giving, taking, holding, throwing, carrying, pushing, pulling, cutting,
    breaking, building, repairing, cooking and eating, drinking, washing, playing, winning, losing, fighting,
    killing, dying, helping, hurting, loving, hating, laughing, crying, smiling, looking, watching, hearing,
    feeling, thinking, knowing, forgetting, remembering, believing, wanting, needing, trying, choosing, changing,
    growing, shrinking, measuring, counting, comparing, moving up, moving down, left and right, inside and outside,
    near and far, front and back, big things, small things, hot things, cold things, old things, new things, fast
    things, slow things, good things, bad things, expensive things, cheap things, dangerous things, strange things,
    secret things, public things, local things, international things, digital things, natural things, artificial
    things, legal things, illegal things
""")


def concepts() -> list[str]:
    """All labels, sorted, each once."""
    labels = [f"words about {topic}" for topic in TOPICS]
    labels += [f"names of {name}" for name in NAMES]
    labels += [f"mentions of {country}" for country in COUNTRIES]
    labels += [f"{language} words" for language in LANGUAGES]
    labels += [f'the word "{word}"' for word in WORDS]
    labels += [f"words ending in -{ending}" for ending in ENDINGS]
    labels += [f"words beginning with {beginning}-" for beginning in BEGINNINGS]
    labels += [f"words beginning with the letter {letter}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    labels += GRAMMAR + MARKS + CODE + FORMS + THINGS
    return sorted(set(labels), key=lambda label: (label.casefold(), label))


def main() -> int:
    """Write the bank, or with ``--check`` say whether it is up to date (exit 1 if not)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the file, write nothing")
    text = HEADER + "\n".join(concepts()) + "\n"
    if parser.parse_args().check:
        return int(TARGET.read_text(encoding="utf-8") != text)
    TARGET.write_text(text, encoding="utf-8")
    sys.stdout.write(f"{len(concepts())} labels, {len(text.encode())} bytes: {TARGET}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
