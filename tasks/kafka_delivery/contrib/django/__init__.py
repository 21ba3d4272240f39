"""A Django app: settings, checks, a signal, and ``manage.py kafka_delivery``::

    INSTALLED_APPS = [..., "kafka_delivery.contrib.django"]
    KAFKA_DELIVERY = {"REDIS_URL": "redis://redis:6379/0", "BOOTSTRAP_SERVERS": "kafka:9092"}

The names are those of the environment variables, without their prefix. A variable that is set comes first.
"""
