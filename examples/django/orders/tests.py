from django.test import TestCase

from kafka_delivery.testing import capture

from .models import Item, Order


class OrderTests(TestCase):
    def setUp(self):
        Item.objects.filter(name="book").update(stock=5)
        self.sent = self.enterContext(capture())

    def order(self, quantity):
        order = {"item": "book", "quantity": quantity}
        with self.captureOnCommitCallbacks(execute=True):
            return self.client.post("/orders", order, content_type="application/json")

    def test_an_order_is_sent(self):
        response = self.order(1)
        self.assertEqual(response.status_code, 201)
        record = self.sent.one(topic="orders", message_id=response.json()["message_id"])
        self.assertEqual(record.json, {"id": Order.objects.get().pk, "item": "book", "quantity": 1})
        self.assertEqual(Item.objects.get(name="book").stock, 4)

    def test_an_order_that_cannot_be_filled_is_not_sent(self):
        response = self.order(6)
        self.assertEqual((response.status_code, response.json()), (409, {"error": "not enough in stock"}))
        self.sent.none()
        self.assertEqual(Order.objects.count(), 0)
