import django.db.models.deletion
from django.db import migrations, models


def stock_up(apps, schema_editor):
    apps.get_model("orders", "Item").objects.create(name="book", stock=1000)


class Migration(migrations.Migration):
    initial = True
    dependencies = []
    operations = [
        migrations.CreateModel(
            name="Item",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("name", models.CharField(max_length=50, unique=True)),
                ("stock", models.PositiveIntegerField()),
            ],
        ),
        migrations.CreateModel(
            name="Order",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("quantity", models.PositiveIntegerField()),
                ("unsent", models.CharField(blank=True, default="", max_length=200)),
                ("item", models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, to="orders.item")),
            ],
        ),
        migrations.RunPython(stock_up, migrations.RunPython.noop),
    ]
