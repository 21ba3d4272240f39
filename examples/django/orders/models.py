from django.db import models


class Item(models.Model):
    name = models.CharField(max_length=50, unique=True)
    stock = models.PositiveIntegerField()  # the database checks that it is not negative


class Order(models.Model):
    item = models.ForeignKey(Item, on_delete=models.PROTECT)
    quantity = models.PositiveIntegerField()
    unsent = models.CharField(max_length=200, default="", blank=True)
    """The message id of its record, if that could not be queued."""

    def record(self):
        value = {"id": self.pk, "item": self.item.name, "quantity": self.quantity}
        return {"topic": "orders", "value": value, "key": str(self.pk)}
