import os
import sqlite3
import sys
from contextlib import closing

from fastapi import FastAPI, HTTPException
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel

from kafka_delivery import EnqueueError, send

SCHEMA = """
CREATE TABLE items (name TEXT PRIMARY KEY, stock INTEGER NOT NULL CHECK (stock >= 0));
CREATE TABLE orders (
    id INTEGER PRIMARY KEY, item TEXT NOT NULL, quantity INTEGER NOT NULL CHECK (quantity > 0), unsent TEXT
);
INSERT INTO items VALUES ('book', 1000);
"""

app = FastAPI()


class Wanted(BaseModel):
    item: str
    quantity: int


@app.post("/orders", status_code=201)
async def create_order(wanted: Wanted):
    try:
        number = await run_in_threadpool(store, wanted.item, wanted.quantity)
    except sqlite3.IntegrityError:
        raise HTTPException(409, "not enough in stock") from None
    try:
        message_id = (await send.adelay(**record(number, wanted.item, wanted.quantity))).id
    except EnqueueError as error:  # Redis is away: `resend` will send it, under the same id
        message_id = error.message_id
        await run_in_threadpool(remember, number, message_id)
    return {"id": number, "message_id": message_id}


@app.get("/health")
async def health():
    return "well"


def database():
    return closing(sqlite3.connect(os.environ.get("SHOP_DATABASE", "shop.sqlite3")))


def store(item, quantity):
    with database() as db, db:  # closed in the end; a transaction
        number = db.execute("INSERT INTO orders (item, quantity) VALUES (?, ?)", (item, quantity)).lastrowid
        db.execute("UPDATE items SET stock = stock - ? WHERE name = ?", (quantity, item))
    return number


def remember(number, message_id):
    with database() as db, db:
        db.execute("UPDATE orders SET unsent = ? WHERE id = ?", (message_id, number))


def record(number, item, quantity):
    value = {"id": number, "item": item, "quantity": quantity}
    return {"topic": "orders", "value": value, "key": str(number)}


def init_db():
    """Make the tables."""
    with database() as db:
        db.executescript(SCHEMA)


def resend():
    """Send the orders that were taken while Redis was away. Run it every minute; twice does no harm."""
    with database() as db:
        missed = "SELECT id, item, quantity, unsent FROM orders WHERE unsent IS NOT NULL"
        for *order, message_id in db.execute(missed).fetchall():
            send.delay(**record(*order), message_id=message_id)
            remember(order[0], None)


if __name__ == "__main__":
    {"init-db": init_db, "resend": resend}[sys.argv[1]]()
