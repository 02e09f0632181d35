"""What a launch makes on its store, what that costs a month, and how it is deleted.

STORE ─ the bucket      made where it is not there; deleted with the rest where nothing is left
├─ kit/SHA/             the code, and the environment that the first machine built
├─ texts/SHA/           texts of this machine, for machines that do not see it
├─ data/                shards: other runs read them too, so they go only when they are named
└─ runs/NAME/           the run
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tuppence.cloud.launch import Launch
from tuppence.cloud.record import Record
from tuppence.errors import UserError
from tuppence.plan.prices import LOCAL, Rate, egress_usd_per_gb, storage_usd_per_gb_month
from tuppence.plan.stages import GB
from tuppence.store import Store, is_url

CLOUDS = {"s3": "aws", "gs": "gcp"}  # whose rates a store of this kind is billed at
STAND_IN = "s3://YOUR-BUCKET/tuppence"  # of a dry run that names no store
PARTS = ("kit", "texts", "data", "runs")
AT_ONCE = 8


@dataclass(frozen=True)
class Stored:
    """Bytes on the store by part, the rate, and what they cost a month."""

    bytes: dict[str, int]
    rate: Rate
    usd_per_month: float

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


def opened(store: str) -> Store:
    """The store that a person names: a URL, or a folder. Raises UserError."""
    return Store(store if is_url(store) else f"file://{Path(store).expanduser().resolve()}")


def check(store: str) -> str:
    """The store's name as machines are told it: a URL, or an absolute path. Raises UserError."""
    if is_url(store):
        protocol = Store(store).protocol
        if protocol not in CLOUDS and protocol != "file":
            raise UserError(f"--store {store}: s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or a folder")
        return store.rstrip("/")
    path = Path(store).expanduser()
    if path.exists() and not path.is_dir():
        raise UserError(f"--store {store} is a file; name a folder or a bucket")
    return str(path.resolve())


def cloud_of(store: str) -> str:
    """Whose rates hold there."""
    return CLOUDS.get(store.partition("://")[0], LOCAL) if is_url(store) else LOCAL


def there(store: str) -> bool:
    """Whether the bucket or the folder is there."""
    return Store(store).bucket_exists() if is_url(store) else Path(store).exists()


def holds(store: str, under: str) -> bool:
    """Whether anything lies below `under`."""
    return bool(opened(store).find(under))


def make(store: str, *, region: str | None = None) -> bool:
    """Make the bucket or the folder where it is not there; True where it was made now."""
    if not is_url(store):
        path = Path(store)
        there = path.exists()
        path.mkdir(parents=True, exist_ok=True)
        return not there
    place = Store(store)
    if place.bucket_exists():
        place.reach()
        return False
    place.make_bucket(region)
    return True


def stored(launch: Launch) -> Stored:
    """What lies on the store of this launch, the store's shards all counted. Raises Away, and
    UserError where it cannot be reached."""
    place = opened(launch.store)
    place.reach()
    parts = {
        "kit": f"kit/{launch.kit}",
        "texts": "texts",
        "data": "data",
        "runs": f"runs/{launch.name}",
    }
    found = {part: sum(place.find(under).values()) for part, under in parts.items()}
    return priced(found, launch.store)


def priced(sizes: dict[str, int], store: str) -> Stored:
    """These bytes at the store's rate by the month."""
    rate = storage_usd_per_gb_month(cloud_of(store))
    return Stored(sizes, rate, sum(sizes.values()) / GB * rate.usd)


def egress_usd(size: int, store: str) -> float:
    """What it costs to bring so many bytes out of the store."""
    return size / GB * egress_usd_per_gb(cloud_of(store)).usd


def delete(record: Record, *, data: bool = False) -> dict[str, int]:
    """Delete what this launch made: its run, its kit and its texts where it sent them, and with
    `data` the shards; the bucket too where it made it and nothing is left. Bytes by part.

    What is not `made` by it stays: another launch may read it. So do kit and texts while another
    run lies on the store, or a launch has marked a kit. Again on an emptied store is fine.
    """
    place, launch = opened(record.launch.store), record.launch
    under = [url.removeprefix(f"{launch.store}/") for url in record.made if url != launch.store]
    if _has_others(place, launch):
        own = ("runs/", mark(launch))
        under = [each for each in under if each.startswith(own)]
    under += ["data"] if data else []
    gone: dict[str, int] = {}
    for folder in under:
        sizes = place.find(folder)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(place.delete, sizes))
        place.drop_unfinished(folder)
        part = folder.partition("/")[0]
        gone[part] = gone.get(part, 0) + sum(sizes.values())
    if launch.store in record.made and is_url(launch.store) and not place.find():
        _drop_if_empty(place)
    return gone


def mark(launch: Launch) -> str:
    """Where a launch says that it reads a kit, which another may have sent."""
    return f"kit/{launch.kit}/launches/{launch.name}"


def _has_others(place: Store, launch: Launch) -> bool:
    """Whether another launch or run is on the store."""
    marks = [name.split("/") for name in place.find("kit")]
    names = {parts[3] for parts in marks if parts[2:3] == ["launches"] and len(parts) > 4}
    names |= {name.split("/")[1] for name in place.find("runs")}
    return bool(names - {launch.name})


def _drop_if_empty(place: Store) -> None:
    """The bucket, where nothing lies in it outside the store's folder either."""
    root = Store(f"{place.protocol}://{place.url.partition('://')[2].partition('/')[0]}")
    if root.bucket_exists() and not root.find():
        root.drop_bucket()


def words(found: Stored, store: str) -> str:
    """What is stored and what it costs, as a person reads it."""
    if not found.total:
        return f"{store}: nothing of this launch is stored"
    parts = ", ".join(f"{part} {size / GB:.3g} GB" for part, size in found.bytes.items() if size)
    return f"{store}: {parts}; ${found.usd_per_month:.2f} a month ({found.rate.item})"
