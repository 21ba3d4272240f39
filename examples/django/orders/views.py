import json

from django.db import IntegrityError, transaction
from django.db.models import F
from django.http import HttpResponse, JsonResponse
from django.shortcuts import get_object_or_404
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST

from kafka_delivery import send

from .models import Item, Order


@csrf_exempt  # so that curl can post; a site has its forms or tokens
@require_POST
def create_order(request):
    wanted = json.loads(request.body)
    item = get_object_or_404(Item, name=wanted["item"])
    try:
        with transaction.atomic():
            order = Order.objects.create(item=item, quantity=wanted["quantity"])
            message_id = send.delay_on_commit(**order.record())
            Item.objects.filter(pk=item.pk).update(stock=F("stock") - order.quantity)
    except IntegrityError:
        return JsonResponse({"error": "not enough in stock"}, status=409)
    return JsonResponse({"id": order.pk, "message_id": message_id}, status=201)


def health(request):
    return HttpResponse("well")
