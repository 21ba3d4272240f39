-- Look through a part of a list, a sorted set or a hash for messages with one of these texts in them. Changes nothing,
-- and looks at so few bytes that Redis serves others in between.
--
-- KEYS: where to look
-- ARGV: list, zset or hash; where to begin ("0" at first); bytes to look at; how many texts; the texts; then other texts,
--       which only count in a message of send_many
-- Reply: where to go on, "" at the end; place and message of each that was found; messages there are; looked at
--
-- A list is looked through from where messages come in, a sorted set from what is due last: what comes in or goes out
-- meanwhile moves nothing past the place that was reached.
local key, kind, at, bytes, texts = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local FIRST = 5
local AT_ONCE = 100

local function any(item, first, last)
  for i = first, last do
    if string.find(item, ARGV[i], 1, true) then return true end
  end
  return false
end

local found, looked, largest = {}, 0, nil
local function look(place, item)
  looked, bytes, largest = looked + 1, bytes - #item, math.max(largest or 0, #item)
  if any(item, FIRST, FIRST + texts - 1)
    or (string.find(item, '"kafka_delivery.send_many"', 1, true) and any(item, FIRST + texts, #ARGV)) then
    found[#found + 1] = place
    found[#found + 1] = item
  end
end

local function at_once()  -- one, until it is known how large messages are
  return largest and math.max(1, math.min(AT_ONCE, math.floor(bytes / math.max(largest, 1)))) or 1
end

local length = redis.call(({list = 'LLEN', zset = 'ZCARD', hash = 'HLEN'})[kind], key)
if kind == 'hash' then
  repeat
    local reply = redis.call('HSCAN', key, at, 'COUNT', 10)
    at = reply[1]
    for i = 1, #reply[2], 2 do look(reply[2][i], reply[2][i + 1]) end
  until at == '0' or bytes <= 0
  return {at == '0' and '' or at, found, length, looked}
end
local index = tonumber(at)
while index < length and bytes > 0 do
  local last = index + at_once() - 1
  if kind == 'list' then
    for i, item in ipairs(redis.call('LRANGE', key, index, last)) do look(length - index - i, item) end
  else
    local items = redis.call('ZRANGE', key, index, last, 'REV', 'WITHSCORES')
    for i = 1, #items, 2 do look(items[i + 1], items[i]) end
  end
  index = last + 1
end
return {index < length and tostring(index) or '', found, length, looked}
