import os
import sqlite3
from contextlib import closing

from flask import Flask, current_app, request

from kafka_delivery import EnqueueError, send
from kafka_delivery.contrib.flask import KafkaDelivery

SCHEMA = """
CREATE TABLE items (name TEXT PRIMARY KEY, stock INTEGER NOT NULL CHECK (stock >= 0));
CREATE TABLE orders (
    id INTEGER PRIMARY KEY, item TEXT NOT NULL, quantity INTEGER NOT NULL CHECK (quantity > 0), unsent TEXT
);
INSERT INTO items VALUES ('book', 1000);
"""

delivery = KafkaDelivery()


def create_app():
    app = Flask(__name__)
    app.config.from_mapping(
        DATABASE=os.environ.get("SHOP_DATABASE", "shop.sqlite3"),
        KAFKA_DELIVERY_REDIS_URL=os.environ.get("SHOP_REDIS_URL", "redis://localhost:6379/0"),
        KAFKA_DELIVERY_BOOTSTRAP_SERVERS=os.environ.get("SHOP_KAFKA", "localhost:9092"),
    )
    delivery.init_app(app)

    @app.post("/orders")
    def create_order():
        wanted = request.get_json()
        with closing(database()) as db:
            try:
                with db:  # a transaction
                    order = (wanted["item"], wanted["quantity"])
                    number = db.execute("INSERT INTO orders (item, quantity) VALUES (?, ?)", order).lastrowid
                    db.execute("UPDATE items SET stock = stock - ? WHERE name = ?", order[::-1])
            except sqlite3.IntegrityError:
                return {"error": "not enough in stock"}, 409
            try:
                message_id = send.delay(**record(number, *order)).id
            except EnqueueError as error:  # Redis is away: `resend` will send it, under the same id
                message_id = error.message_id
                with db:
                    db.execute("UPDATE orders SET unsent = ? WHERE id = ?", (message_id, number))
        return {"id": number, "message_id": message_id}, 201

    @app.get("/health")
    def health():
        return "well"

    @app.cli.command()
    def init_db():
        """Make the tables."""
        with closing(database()) as db:
            db.executescript(SCHEMA)

    @app.cli.command()
    def resend():
        """Send the orders that were taken while Redis was away. Run it every minute; twice does no harm."""
        with closing(database()) as db:
            missed = "SELECT id, item, quantity, unsent FROM orders WHERE unsent IS NOT NULL"
            for *order, message_id in db.execute(missed).fetchall():
                send.delay(**record(*order), message_id=message_id)
                with db:
                    db.execute("UPDATE orders SET unsent = NULL WHERE id = ?", order[:1])

    return app


def database():
    return sqlite3.connect(current_app.config["DATABASE"])


def record(number, item, quantity):
    value = {"id": number, "item": item, "quantity": quantity}
    return {"topic": "orders", "value": value, "key": str(number)}
