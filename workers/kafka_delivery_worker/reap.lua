-- Return what a worker whose lease is over still holds to the front of its lists, oldest first. All or nothing, so
-- that of many who look one does it. Also a stopping worker's last act, with itself as the worker; and how a living one
-- gives back some of what it holds.
--
-- KEYS: leases, held (of that worker), deaths, poison
-- ARGV: worker, prefix of keys, deaths that a message may cause, "1" if the worker died (else it stops), and, if only
--       some is to be returned, their delivery tags
-- Reply: messages returned, messages moved to poison; {-1, 0} if the lease is not over
local died, some = ARGV[4] == '1', #ARGV > 4
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local till = redis.call('ZSCORE', KEYS[1], ARGV[1])
if died and till and tonumber(till) > now then return {-1, 0} end
redis.call('HDEL', KEYS[2], '')  -- needs no memory, so that a full Redis lets pass what follows

local held = {}
if some then
  for i = 5, #ARGV do
    local item = redis.call('HGET', KEYS[2], ARGV[i])
    if item then held[#held + 1] = ARGV[i]; held[#held + 1] = item end
  end
else
  held = redis.call('HGETALL', KEYS[2])
end
local order = {}
for i = 1, #held, 2 do
  local claim, place = string.match(held[i], '^(%d+)%.(%d+):')
  order[#order + 1] = {tonumber(claim), tonumber(place), held[i], held[i + 1]}
end
table.sort(order, function(a, b) return a[1] > b[1] or (a[1] == b[1] and a[2] > b[2]) end)

local returned, poisonous = 0, 0
for _, message in ipairs(order) do
  local tag, item = message[3], message[4]
  local list = string.match(tag, ':(.*)$')
  local deaths = 0
  if died then
    local name = string.match(item, '.*"delivery_tag": "([^"]+)"')
    if name then deaths = redis.call('HINCRBY', KEYS[3], name, 1) end
  end
  if deaths >= tonumber(ARGV[3]) then
    redis.call('RPUSH', KEYS[4], list .. '\n' .. item)
    poisonous = poisonous + 1
  else
    redis.call('RPUSH', ARGV[2] .. list, item)  -- the newest first, so the oldest ends nearest the exit
    returned = returned + 1
  end
  redis.call('HDEL', KEYS[2], tag)
end
if died and #order > 0 then redis.call('EXPIRE', KEYS[3], 86400) end
if not some then redis.call('ZREM', KEYS[1], ARGV[1]) end
return {returned, poisonous}
