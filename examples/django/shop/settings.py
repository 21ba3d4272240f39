import os
from pathlib import Path

BASE_DIR = Path(__file__).parent.parent
SECRET_KEY = os.environ.get("SHOP_SECRET_KEY", "only for trying")
ALLOWED_HOSTS = ["localhost", "127.0.0.1"]
ROOT_URLCONF = "shop.urls"
INSTALLED_APPS = ["kafka_delivery.contrib.django", "orders"]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("SHOP_DATABASE", BASE_DIR / "shop.sqlite3"),
        "OPTIONS": {"transaction_mode": "IMMEDIATE"},  # writers of several processes wait for each other
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

KAFKA_DELIVERY = {
    "REDIS_URL": os.environ.get("SHOP_REDIS_URL", "redis://localhost:6379/0"),
    "BOOTSTRAP_SERVERS": os.environ.get("SHOP_KAFKA", "localhost:9092"),
}
