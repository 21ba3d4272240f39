from django.dispatch import receiver

from kafka_delivery.contrib.django.signals import record_not_queued

from .models import Order


@receiver(record_not_queued)
def remember(records, **kwargs):
    """Redis was away after an order was committed: `manage.py resend` will send it, under the same id."""
    for record in records:
        Order.objects.filter(pk=int(record.key_bytes)).update(unsent=record.id)
