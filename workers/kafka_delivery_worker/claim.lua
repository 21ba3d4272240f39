-- Settle what a worker is done with, and lease it the next messages, in one step.
--
-- KEYS: gate, leases, held (of this worker), deaths, the cluster's circuit, leases of its probes, topics whose records
--       wait, poison, then for each list of each queue: the list, its delayed set
-- ARGV: worker, lease (ms), room (messages), room (bytes), claim number, prefix of keys, messages that it may hold, how
--       long that grows after an outage (ms), base of the keys of circuits, scope of the probe that it may send and its
--       token ("" for none), base of the keys of delayed sets, messages that it may hold besides at any time, deaths from
--       which a message is claimed alone, deaths that it may cause, number of acks, of returns, of messages put aside, of
--       those put off and of those whose process died, acks..., returns..., tag and topic of each that is put aside...,
--       tag and ms of each that is put off..., those whose process died..., then the name of each list, as it is part of
--       a delivery tag
--
-- Reply: {1, items, their tags, suspicion of each (-1: it waited for its topic's circuit, which is closed), ms until the next delayed message is due (-1: none), messages held}
--        {0, ...} nothing is there; {2, ...} a suspect waits for empty hands; {3, ...} not so many yet, after an outage;
--        {-1, ...} the gate is shut
--
-- A delivery tag is "<claim number>.<place>:<list>": never used twice by a worker, so that an answer which was lost
-- on its way is not overwritten by the next claim.
--
-- An error in the middle would lose what was taken out of a list: whatever can fail is tried before that.
local held, deaths = KEYS[3], KEYS[4]
local worker, lease, room, bytes = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local claim, prefix, limit, ramp = ARGV[5], ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8])
local circuits, probe, token = ARGV[9], ARGV[10], ARGV[11]
local delayed_sets = ARGV[12]
local beyond = tonumber(ARGV[13])
local alone_from, max_deaths = tonumber(ARGV[14]), tonumber(ARGV[15])
local acks, returns, asides, offs = tonumber(ARGV[16]), tonumber(ARGV[17]), tonumber(ARGV[18]), tonumber(ARGV[19])
local FIRST_ACK = 21
local first_return = FIRST_ACK + acks
local first_aside = first_return + returns
local first_off = first_aside + 2 * asides
local first_died = first_off + 2 * offs
local first_name = first_died + tonumber(ARGV[20])
local FIRST_LIST = 9
local AT_ONCE = 50  -- messages that are taken out of a list by one command
local MOVES = 1000  -- messages that are put aside until they are due by one claim; Redis serves nobody meanwhile
local FIRST_PAUSE, LONGEST_PAUSE = 2000, 60000  -- of a message whose process died (ms); it doubles with each death

-- A full Redis refuses a script whose first write needs memory, and lets all of any other pass. This one needs none:
-- what workers take out is what makes room. A Redis that refuses all writes refuses here.
redis.call('HDEL', held, '')

if remembers(deaths) then
  for i = FIRST_ACK, first_return - 1 do
    local item = redis.call('HGET', held, ARGV[i])
    if item then forget(deaths, item) end
  end
end
for i = FIRST_ACK, first_return - 1, 1000 do
  redis.call('HDEL', held, unpack(ARGV, i, math.min(i + 999, first_return - 1)))
end
local function move(tag, list)
  local item = redis.call('HGET', held, tag)
  if item then  -- else this worker lost its lease, and the message is elsewhere by now
    redis.call('LPUSH', list, item)
    redis.call('HDEL', held, tag)
  end
end
for i = first_return, first_aside - 1 do move(ARGV[i], prefix .. string.match(ARGV[i], ':(.*)$')) end
for i = first_aside, first_off - 1, 2 do  -- their topic's circuit is open: they wait in a list of their own
  local member = ARGV[i + 1] .. ':' .. string.match(ARGV[i], ':(.*)$')
  redis.call('SADD', KEYS[7], member)
  move(ARGV[i], KEYS[7] .. ':' .. member)
end
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local PUT_OFF = 0.5  -- ms that tell a message which is put off from one that waits for its own time; see recall.lua
for i = first_off, first_died - 1, 2 do
  local item = redis.call('HGET', held, ARGV[i])
  if item then
    redis.call('ZADD', delayed_sets .. string.match(ARGV[i], ':(.*)$'), now + ARGV[i + 1] + PUT_OFF, item)
    redis.call('HDEL', held, ARGV[i])
  end
end
for i = first_died, first_name - 1 do  -- a process of this worker died, and had nothing else in its hands
  local item = redis.call('HGET', held, ARGV[i])
  if item then
    local list, died = string.match(ARGV[i], ':(.*)$'), count(deaths, item, DEATH) / DEATH
    if died >= max_deaths then
      poisoned(deaths, KEYS[8], list, item)
    else
      local pause = math.min(LONGEST_PAUSE, FIRST_PAUSE * 2 ^ math.max(0, math.floor(died) - 1))
      redis.call('ZADD', delayed_sets .. list, now + pause + PUT_OFF, item)
    end
    redis.call('HDEL', held, ARGV[i])
  end
end

local items, tags, suspected, next_due = {}, {}, {}, -1
local function answer(status)
  return {status, items, tags, suspected, next_due, redis.call('HLEN', held)}
end

if room <= 0 or bytes <= 0 then return answer(0) end
if redis.call('EXISTS', KEYS[1]) == 1 then return answer(-1) end

redis.call('ZADD', KEYS[2], now + lease, worker)

-- Whether records wait for a circuit. One that no worker has looked at for half a minute says nothing any more, or all
-- would wait for ever when only reports fail; but what a person forces holds until its end.
local LAPSES = 30000
local function shut(state, stored)
  if stored ~= '1' then return false end
  local forced = redis.call('HMGET', state, 'forced', 'forced_till', 'forced_at')
  local till = tonumber(forced[2] or 0)
  if forced[1] == 'open' and (till == 0 or (now < till and now >= tonumber(forced[3] or 0))) then return true end
  return redis.call('ZCOUNT', circuits .. 'workers', now - LAPSES, now + LAPSES) > 0
end

local circuit = redis.call('HMGET', KEYS[5], 'shut', 'ramp_at', 'trips')
if probe == 'cluster' then
  local till = redis.call('ZSCORE', KEYS[6], token)
  if not till or tonumber(till) <= now then return answer(-1) end
elseif probe ~= 'local' and shut(KEYS[5], circuit[1]) then  -- that one is for when the fleet's circuits cannot be known
  return answer(-1)
end
if probe ~= '' then
  room = 1
else
  local passed = now - tonumber(circuit[2] or 0)
  if passed >= 0 and passed < ramp then  -- slowly: what waited behind an outage would be the next one
    room = math.min(room, math.ceil(limit * (passed / ramp) ^ 2) + beyond - redis.call('HLEN', held))
    if room <= 0 and redis.call('HLEN', held) == 0 then room = 1 end
    if room <= 0 then return answer(3) end
  end
end

-- A message that several workers died with is a suspect: it is claimed alone, by a worker that holds nothing else, so
-- that the next death proves something.
local any_suspects = remembers(deaths)
local empty_handed = redis.call('HLEN', held) == 0
local function suspicion(item)  -- deaths that it was in
  return any_suspects and points(deaths, item) / DEATH or 0
end

if any_suspects and redis.call('HLEN', held) == 1 and suspicion(redis.call('HVALS', held)[1]) >= alone_from then
  return answer(2)  -- nothing joins a suspect, so that nothing innocent dies with it
end

local waiting = {}  -- whether a list or its delayed set holds anything
local suspect = nil
for i = FIRST_LIST, #KEYS, 2 do
  waiting[i] = redis.call('LLEN', KEYS[i]) + redis.call('ZCARD', KEYS[i + 1]) > 0
  if any_suspects and not suspect then
    local oldest = redis.call('LINDEX', KEYS[i], -1)
    if oldest and suspicion(oldest) >= alone_from then suspect = i end
  end
end

local function days(y, m, d)  -- since 1970-01-01, Gregorian
  if m <= 2 then y = y - 1; m = m + 12 end
  return 365 * y + math.floor(y / 4) - math.floor(y / 100) + math.floor(y / 400)
    + math.floor((153 * (m - 3) + 2) / 5) + d - 719469
end

local NAMES = 10  -- places of a message at which its time may be; a value may look like the name
local function time_of(item)  -- the place of the value that follows the first `"eta"` with a colon behind it, if any
  local stop = 0
  for _ = 1, NAMES do
    local _, at = string.find(item, '"eta"', stop + 1, true)
    if not at then return nil end
    local value = string.match(item, '^[ \t\r\n]*:[ \t\r\n]*()', at + 1)
    if value then return value end
    stop = at
  end
end

-- When a message is due (ms), 0 for now. The body is base64, quotes within strings are escaped, and Celery's headers
-- come before the caller's: the first `"eta"` is Celery's. What is not understood is left to Celery's own timer.
local function due(item)
  local value = time_of(item)
  if not value then return 0 end
  local y, mo, d, h, mi, s, fraction, zone = string.match(
    string.sub(item, value, value + 40), '^"(%d%d%d%d)-(%d%d)-(%d%d)[T ](%d%d):(%d%d):(%d%d)(%.?%d*)([^"]*)"')
  if not y then return 0 end
  y, mo, d, h, mi, s = y + 0, mo + 0, d + 0, h + 0, mi + 0, s + 0
  if y > 9998 or mo < 1 or mo > 12 or d < 1 or days(y, mo, d) >= days(y, mo + 1, 1) or h > 23 or mi > 59 or s > 59 then
    return 0
  end
  local offset = 0
  local sign, oh, om = string.match(zone, '^([+-])(%d%d):?(%d%d)$')
  if sign then offset = (oh * 60 + om) * (sign == '-' and -1 or 1)
  elseif zone ~= 'Z' and zone ~= '' then return 0 end
  return ((days(y, mo, d) * 24 + h) * 60 + mi - offset) * 60000 + s * 1000
    + math.floor((tonumber('0' .. fraction) or 0) * 1000)
end

local suspect_waits, moved, largest = false, 0, nil

local function at_once()  -- one, until it is known how large messages are
  return largest and math.max(1, math.min(room, AT_ONCE, math.floor(bytes / largest))) or 1
end

local RELEASED = -1  -- in place of a suspicion: it comes from a list of its topic's own, whose circuit is closed
local function take(list, name, taken, released)  -- into the worker's hands; what is too much goes back
  local fields, kept = {}, #taken
  for i, item in ipairs(taken) do
    local died = suspicion(item)
    local alone = died >= alone_from
    if bytes <= 0 then kept = i - 1; break end
    if alone and (#items > 0 or not empty_handed) then
      room, suspect_waits, kept = 0, true, i - 1
      break
    end
    local tag = claim .. '.' .. (#items + 1) .. ':' .. name
    items[#items + 1] = item
    tags[#tags + 1] = tag
    suspected[#suspected + 1] = released and died == 0 and RELEASED or math.ceil(died)
    fields[#fields + 1] = tag
    fields[#fields + 1] = item
    room = room - 1
    bytes = bytes - #item
    if alone then room, kept = 0, i; break end
  end
  for i = #taken, kept + 1, -1 do redis.call('RPUSH', list, taken[i]) end
  if #fields > 0 then redis.call('HSET', held, unpack(fields)) end
end

-- A suspect that is the next of its list goes first, and what other lists hold waits until somebody's hands are empty:
-- a list that is always full would keep it waiting for ever.
if suspect and probe == '' then
  if not empty_handed then return answer(2) end
  take(KEYS[suspect], ARGV[first_name + (suspect - FIRST_LIST) / 2], {redis.call('RPOP', KEYS[suspect])})
  return answer(1)
end

-- What waited while its topic's circuit was open comes before what came later; of a topic that is probed, one.
local served = {}
for i = first_name, #ARGV do served[ARGV[i]] = true end
local probed = string.match(probe, '^topic:(.*)$')
local function take_waiting(flows, released)
  for _, member in ipairs(redis.call('SMEMBERS', KEYS[7])) do
    local topic, name = string.match(member, '^([^:]*):(.*)$')
    local list = KEYS[7] .. ':' .. member
    while served[name] and flows(topic) and room > 0 and bytes > 0 do
      local popped = redis.call('RPOP', list, at_once())
      if not popped then
        redis.call('SREM', KEYS[7], member)
        break
      end
      for _, item in ipairs(popped) do largest = math.max(largest or 0, #item) end
      take(list, name, popped, released)
    end
  end
end
take_waiting(function(topic)
  if probed then return topic == probed end
  local state = circuits .. 'topic:' .. topic .. ':st'
  return not shut(state, redis.call('HGET', state, 'shut'))
end, true)
if probed then room = 0 end

-- Round after round has failed: perhaps for the topic of what is at the front. The newest may be another topic's.
local trips = tonumber(circuit[3] or 0)
-- And a suspect says little: it may take its worker down, and the next one would get it again.
local newest = suspect or (probe == 'cluster' and trips >= 4 and trips % 2 == 0)
local pop = newest and 'LPOP' or 'RPOP'

for i = FIRST_LIST, #KEYS, 2 do
  local list, delayed, name = KEYS[i], KEYS[i + 1], ARGV[first_name + (i - FIRST_LIST) / 2]
  while waiting[i] and room > 0 and bytes > 0 do
    local ready = redis.call('ZRANGEBYSCORE', delayed, '-inf', now, 'LIMIT', 0, at_once())
    if #ready == 0 then break end
    redis.call('ZREM', delayed, unpack(ready))
    for _, item in ipairs(ready) do largest = math.max(largest or 0, #item) end
    take(list, name, ready)
  end
  while waiting[i] and room > 0 and bytes > 0 and moved < MOVES do
    local popped = redis.call(pop, list, at_once())
    if not popped then break end
    local taken = {}
    for _, item in ipairs(popped) do
      largest = math.max(largest or 0, #item)
      local at = due(item)
      if at > now then
        redis.call('ZADD', delayed, at, item)
        moved = moved + 1
      else
        taken[#taken + 1] = item
      end
    end
    take(list, name, taken)
  end
  local soonest = waiting[i] and redis.call('ZRANGE', delayed, 0, 0, 'WITHSCORES')[2]
  if soonest then
    local wait = math.max(0, soonest - now)
    if next_due < 0 or wait < next_due then next_due = wait end
  end
end

-- Where only records of topics in trouble wait, one of these shows whether the cluster is back.
if (probe == 'cluster' or probe == 'local') and #items == 0 and not suspect_waits then
  take_waiting(function() return true end, true)
end

return answer(#items > 0 and 1 or (suspect_waits and 2 or 0))
