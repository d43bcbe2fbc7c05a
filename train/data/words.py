"""Words, names and cities of the generated tasks, and the rule that splits them into training and test.

The operands, words and cities of a test item are never used in training. The rule is a hash, so it holds for every
seed. It is symmetric: (a, b) and (b, a) are always in the same split, and so are a word and its reverse.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Literal, TypeVar

from numpy.random import Generator

Split = Literal["train", "test"]
T = TypeVar("T")

ONE_IN = 8  # one operand pair, word or city in eight is held out
SALT = b"step-tiny 177"  # with it 467 + 358, "hello" and Havana, which the documentation shows, are held out
VOWELS, CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxyz"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _bucket(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4, key=SALT).digest(), "little") % ONE_IN


def pair_split(a: int, b: int) -> Split:
    """The split of an unordered pair of operands."""
    return "test" if _bucket(f"{min(a, b)},{max(a, b)}") == 0 else "train"


def word_split(word: str) -> Split:
    """The split of a word. Capitals and direction make no difference."""
    lower = word.lower()
    return "test" if _bucket(min(lower, lower[::-1])) == 0 else "train"


def pick(rng: Generator, options: Sequence[T]) -> T:
    """One option, all equally likely."""
    return options[int(rng.integers(len(options)))]


def chance(rng: Generator, probability: float) -> bool:
    """True with the given probability."""
    return float(rng.random()) < probability


def _letters(rng: Generator, length: int) -> str:
    return "".join([LETTERS[i] for i in rng.integers(26, size=length)])


def _syllables(rng: Generator, length: int) -> str:
    letters: list[str] = []
    vowel = chance(rng, 0.3)
    while len(letters) < length:
        letters.append(pick(rng, VOWELS if vowel else CONSONANTS))
        vowel = not vowel if chance(rng, 0.85) else vowel
    return "".join(letters)


def word(rng: Generator, split: Split, *, shortest: int = 3, longest: int = 8) -> str:
    """A lower-case word of the split, of random letters or syllables."""
    while True:
        length = int(rng.integers(shortest, longest + 1))
        candidate = _syllables(rng, length) if chance(rng, 0.6) else _letters(rng, length)
        if word_split(candidate) == split:
            return candidate


def name(rng: Generator, split: Split) -> str:
    """A capitalised name of four to nine letters."""
    return word(rng, split, shortest=4, longest=9).capitalize()


def symbol(rng: Generator, split: Split) -> str:
    """Three or four capitals, like a ticker symbol."""
    while True:
        candidate = _letters(rng, int(rng.integers(3, 5)))
        if word_split(candidate) == split:
            return candidate.upper()


@functools.cache
def cities(split: Split) -> tuple[str, ...]:
    """The listed cities of a split."""
    return tuple(city for city in CITIES if word_split(city) == split)


def city(rng: Generator, split: Split) -> str:
    """A listed city or, four times in ten, a made-up one, so that a model cannot copy from memory."""
    return name(rng, split) if chance(rng, 0.4) else pick(rng, cities(split))


CITIES = tuple(
    " ".join(entry.split())
    for entry in """
    Aachen, Aalborg, Aarhus, Aberdeen, Abidjan, Abu Dhabi, Abuja, Acapulco, Accra, Adana, Addis Ababa, Adelaide,
    Aden, Agadir, Agra, Ahmedabad, Ajaccio, Albany, Albuquerque, Aleppo, Alexandria, Algiers, Alicante, Almaty,
    Amman, Amsterdam, Anchorage, Andorra, Ankara, Annapolis, Antalya, Antwerp, Apia, Aqaba, Arequipa, Arezzo,
    Arnhem, Ashgabat, Asmara, Astana, Asuncion, Aswan, Athens, Atlanta, Auckland, Augsburg, Austin, Avignon,
    Baghdad, Baku, Baltimore, Bamako, Bandung, Bangalore, Bangkok, Bangui, Banjul, Barcelona, Bari, Basel, Basra,
    Bath, Beijing, Beirut, Belfast, Belgrade, Belmopan, Bergamo, Bergen, Berlin, Bern, Bhopal, Bilbao, Birmingham,
    Bishkek, Bissau, Bogota, Boise, Bologna, Bonn, Bordeaux, Boston, Brasilia, Bratislava, Bremen, Brest, Brighton,
    Brisbane, Bristol, Brno, Bruges, Brussels, Bucharest, Budapest, Buenos Aires, Buffalo, Bursa, Busan, Cadiz,
    Caen, Cairns, Cairo, Calais, Calcutta, Calgary, Cali, Cambridge, Canberra, Cancun, Cannes, Canton, Cape Town,
    Caracas, Cardiff, Cartagena, Casablanca, Catania, Cayenne, Cebu, Changsha, Charlotte, Chengdu, Chennai, Chicago,
    Chisinau, Cincinnati, Cleveland, Cologne, Colombo, Columbus, Conakry, Copenhagen, Cordoba, Cork, Coventry,
    Crete, Curitiba, Cusco, Dakar, Dalian, Dallas, Damascus, Danzig, Darwin, Davao, Debrecen, Delft, Delhi, Denver,
    Derby, Detroit, Dhaka, Dijon, Dili, Djibouti, Dodoma, Doha, Dortmund, Douala, Dover, Dresden, Dubai, Dublin,
    Dubrovnik, Duisburg, Dundee, Durban, Durham, Dushanbe, Edinburgh, Edmonton, Eindhoven, Essen, Exeter, Faro, Fez,
    Florence, Fortaleza, Frankfurt, Freetown, Freiburg, Fukuoka, Funchal, Gaborone, Galway, Gdansk, Geneva, Genoa,
    Georgetown, Ghent, Gibraltar, Giza, Glasgow, Goa, Gothenburg, Granada, Graz, Grenoble, Groningen, Guangzhou,
    Guatemala, Guayaquil, Haarlem, Haifa, Halifax, Hamburg, Hamilton, Hangzhou, Hannover, Hanoi, Harare, Harbin,
    Hartford, Havana, Helsinki, Herat, Hiroshima, Hobart, Honiara, Honolulu, Houston, Hyderabad, Ibadan, Incheon,
    Indore, Innsbruck, Iquitos, Isfahan, Islamabad, Istanbul, Izmir, Jaffa, Jaipur, Jakarta, Jeddah, Jena,
    Jerusalem, Jinan, Johannesburg, Juba, Juneau, Kabul, Kampala, Kandahar, Kano, Kanpur, Kansas City, Karachi,
    Kassel, Kathmandu, Katowice, Kaunas, Kazan, Khartoum, Kharkiv, Kiel, Kigali, Kingston, Kinshasa, Klagenfurt,
    Kobe, Koblenz, Kolkata, Kosice, Krakow, Kuala Lumpur, Kumasi, Kunming, Kuwait, Kyiv, Kyoto, La Paz, Lagos,
    Lahore, Lancaster, Las Vegas, Lausanne, Leeds, Leicester, Leiden, Leipzig, Leon, Liege, Lille, Lilongwe, Lima,
    Limerick, Lincoln, Linz, Lisbon, Liverpool, Ljubljana, Lodz, Lome, London, Los Angeles, Louisville, Luanda,
    Lucerne, Lucknow, Lugano, Lusaka, Luxembourg, Luxor, Lviv, Lyon, Maastricht, Macau, Madison, Madrid, Mainz,
    Majuro, Malabo, Malaga, Male, Malmo, Managua, Manama, Manaus, Manchester, Mandalay, Manila, Mannheim, Maputo,
    Maribor, Marrakesh, Marseille, Maseru, Mashhad, Mbabane, Mecca, Medan, Medellin, Medina, Melbourne, Memphis,
    Mendoza, Merida, Messina, Mexico City, Miami, Milan, Milwaukee, Minneapolis, Minsk, Mobile, Modena, Mogadishu,
    Mombasa, Monaco, Monrovia, Monterrey, Montevideo, Montpellier, Montreal, Moroni, Moscow, Mosul, Mumbai, Munich,
    Munster, Murcia, Muscat, Mysore, Nagasaki, Nagoya, Nagpur, Nairobi, Namur, Nanjing, Nantes, Naples, Nashville,
    Nassau, New Delhi, New Orleans, New York, Newark, Newcastle, Niamey, Nice, Nicosia, Nimes, Norwich, Nottingham,
    Nouakchott, Novosibirsk, Nuremberg, Nuuk, Oakland, Odense, Odessa, Omaha, Omsk, Oporto, Oran, Orlando, Orleans,
    Osaka, Oslo, Ostend, Ottawa, Oulu, Oviedo, Oxford, Padua, Palermo, Palma, Panama City, Paramaribo, Paris, Parma,
    Patna, Penang, Perm, Perth, Perugia, Peshawar, Phoenix, Pisa, Pittsburgh, Plovdiv, Plymouth, Podgorica,
    Poitiers, Port Louis, Portland, Porto, Portsmouth, Potsdam, Poznan, Prague, Praia, Pretoria, Pristina, Pune,
    Puebla, Quebec, Quetta, Quito, Rabat, Raleigh, Ravenna, Reading, Recife, Regina, Reims, Rennes, Reykjavik,
    Richmond, Riga, Rimini, Rio, Riyadh, Rochester, Rome, Rosario, Roskilde, Rostock, Rotterdam, Rouen, Sacramento,
    Salamanca, Salerno, Salvador, Salzburg, Samarkand, San Diego, San Jose, San Juan, Santa Fe, Santander, Santiago,
    Santos, Sanaa, Sapporo, Sarajevo, Seattle, Sendai, Seoul, Seville, Shanghai, Sheffield, Shenzhen, Shiraz, Siena,
    Singapore, Skopje, Sofia, Split, Stavanger, Stockholm, Strasbourg, Stuttgart, Sucre, Surabaya, Surat, Suva,
    Swansea, Sydney, Szeged, Tabriz, Taipei, Tallinn, Tampa, Tampere, Tangier, Taranto, Tartu, Tashkent, Tbilisi,
    Tegucigalpa, Tehran, Tel Aviv, Thimphu, Tianjin, Tijuana, Timbuktu, Tirana, Tokyo, Toledo, Toronto, Toulon,
    Toulouse, Tours, Trento, Trier, Trieste, Tripoli, Trondheim, Tucson, Tulsa, Tunis, Turin, Turku, Ulm, Uppsala,
    Utrecht, Vaduz, Valencia, Valladolid, Valletta, Valparaiso, Vancouver, Varna, Venice, Verona, Victoria, Vienna,
    Vientiane, Vigo, Vilnius, Warsaw, Washington, Wellington, Wiesbaden, Windhoek, Winnipeg, Wroclaw, Wuhan,
    Wurzburg, Yangon, Yaounde, Yerevan, York, Zagreb, Zanzibar, Zaragoza, Zurich""".split(",")
)
