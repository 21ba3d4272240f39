from django.core.management.base import BaseCommand

from kafka_delivery import send
from orders.models import Order


class Command(BaseCommand):
    help = "Send the orders that were taken while Redis was away. Run it every minute; twice does no harm."

    def handle(self, **options):
        for order in Order.objects.exclude(unsent="").select_related("item"):
            send.delay(**order.record(), message_id=order.unsent)
            Order.objects.filter(pk=order.pk).update(unsent="")
